"""Tiny random checkpoints that transformers itself writes: the oracle and Phalanx read the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe")

MIXTURES = ("olmoe", "deepseek_v2", "deepseek_v3", "minimax_m2", "glm4_moe", "gpt_oss")
"""Families with something of their own in attention, routing or experts. Not any number of heads fits their shapes."""

VOCAB_SIZE = 260
"""256 bytes and four special tokens."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "olmoe": {"hidden_size": 80, "head_dim": 10, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **_LATENT,
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**_LATENT, "q_lora_rank": 40, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11},
}

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, dtype: str = "float32", **shape: Any
) -> Path:
    """Write a random model of `family` with a byte-level tokenizer into `folder`; `shape` overrides its configuration.

    Weights are spread widely enough that greedy tokens vary.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SHAPE, **_OWN.get(family, {}), **shape})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    _vary_constants(model)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _vary_constants(model: Any) -> None:
    """Norms, biases and corrections of routers begin as ones or zeros, which would hide that one is not applied."""
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if (tensor == tensor.flatten()[0]).all():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
