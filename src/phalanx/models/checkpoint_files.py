"""Names of the files that make up a checkpoint of Hugging Face's layout."""

from __future__ import annotations

MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json")

BESIDE_THE_MODEL = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.jinja", "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What holds for another model that is made of this one, too."""
