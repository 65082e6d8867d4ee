"""Shapes beside the families' own: each is a family, and what of its configuration is another."""

from __future__ import annotations

from typing import Any

NINE_HEADS = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_size": 72,
    "intermediate_size": 97,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nine heads": ("llama", NINE_HEADS),
    "nine heads and experts": ("qwen3_moe", {**NINE_HEADS, "moe_intermediate_size": 41, "mlp_only_layers": [1]}),
    "nine heads and biases": ("llama", {**NINE_HEADS, "attention_bias": True, "mlp_bias": True}),
    "one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 263}),
    "windows on some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "experts on some layers": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn rope": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
}
