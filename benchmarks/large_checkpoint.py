"""A checkpoint of a real model's shape with random weights, written by many threads.

`phalanx.testing.checkpoints` has transformers make the model first, which takes many minutes for tens of gigabytes.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

INDEX = "model.safetensors.index.json"
STD = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}


def write_large_checkpoint(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write config.json and a file for each layer. Norms are ones, all else is normal with the usual deviation.

    Takes as long as the disk does, and memory for a few layers. There is no tokenizer.
    """
    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype=dtype)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    files: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        files[f"layer-{layer}.safetensors"][name] = tensor.shape
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(_write, folder, dtype), files.items(), range(len(files))))
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write(folder: Path, dtype: torch.dtype, file: tuple[str, dict[str, torch.Size]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if name.endswith("norm.weight")
        else torch.empty(shape, dtype=dtype).normal_(std=STD, generator=generator)
        for name, shape in file[1].items()
    }
    save_file(tensors, folder / file[0], metadata={"format": "pt"})
