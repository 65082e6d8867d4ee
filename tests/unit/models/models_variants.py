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
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
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
    "experts for our kernel": ("qwen3_moe", {"hidden_size": 64, "moe_intermediate_size": 128}),
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
    "yarn rope": ("qwen3", {"rope_parameters": YARN}),
    "clipped": ("olmoe", {"clip_qkv": 0.4, "norm_topk_prob": True, "attention_bias": True}),
    "norms of nine heads": ("minimax_m2", {**NINE_HEADS, "rotary_dim": 4}),
    "greedy experts, query from a latent": (
        "deepseek_v2",
        {"topk_method": "greedy", "q_lora_rank": 20, "first_k_dense_replace": 0, "attention_bias": True},
    ),
    "nine latent heads": (
        "deepseek_v3",
        {**NINE_HEADS, "num_key_value_heads": 9, "moe_intermediate_size": 41, "n_shared_experts": 1},
    ),
    "latent heads, rope in halves, yarn": (
        "deepseek_v3",
        {
            "rope_interleave": False,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "nine heads and experts in groups": (
        "glm4_moe",
        {**NINE_HEADS, "moe_intermediate_size": 41, "n_routed_experts": 6, "n_group": 3, "topk_group": 2},
    ),
    "no norms of heads": ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    "nine heads and sinks": ("gpt_oss", NINE_HEADS),
}
