"""The KV cache of one rank: two tensors for each attention layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.memory.arena import Allocate
from phalanx.models.model import LayerCache


def block_bytes(layers: Sequence[LayerCache], block_size: int, dtype: torch.dtype) -> int:
    """What one block takes, over all layers."""
    return block_size * dtype.itemsize * sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)


def allocate_cache(
    layers: Sequence[LayerCache], num_blocks: int, block_size: int, dtype: torch.dtype, allocate: Allocate
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [num_blocks, block_size, num_kv_heads, key_dim or value_dim]."""
    return [
        (
            allocate(f"key.{i}", (num_blocks, block_size, layer.num_kv_heads, layer.key_dim), dtype),
            allocate(f"value.{i}", (num_blocks, block_size, layer.num_kv_heads, layer.value_dim), dtype),
        )
        for i, layer in enumerate(layers)
    ]
