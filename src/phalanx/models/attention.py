"""Attention over the paged KV cache, where transformers' model definitions call for attention.

transformers looks attention up by name; ours is `phalanx`. As no mask function has that name, no mask is built. A
model sees the step's tokens as one long sequence [1, H, T, D]; which rows they make up, and where their context lies,
is in the step's AttentionBatch.

Shape suffixes: T tokens of the step, R rows, B blocks of a row, H query heads, K KV heads, D head size, V value size.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.models.attention_batch import AttentionBatch, Backend

ATTENTION = "phalanx"
"""The name under which transformers finds our attention."""


class Step:
    """The batch that the model is working on. The model sets it, its attention layers read it."""

    batch: AttentionBatch | None = None


class PagedAttention:
    """The cache of one attention layer, and attention over it."""

    def __init__(self, step: Step, backend: Backend) -> None:
        self._step = step
        self._backend = backend
        self._key_cache: Tensor | None = None
        self._value_cache: Tensor | None = None

    def bind(self, key_cache: Tensor | None, value_cache: Tensor | None) -> None:
        """Use this cache from now on; None for none."""
        self._key_cache, self._value_cache = key_cache, value_cache

    def copy_blocks(self, sources_N: Tensor, targets_N: Tensor) -> None:
        """Have blocks of the cache hold what others hold. No block is in both."""
        for cache in (self._key_cache, self._value_cache):
            assert cache is not None, "there is no cache"
            cache[targets_N] = cache[sources_N]

    def __call__(
        self,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKV: Tensor,
        scale: float,
        sliding_window: int | None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Put the new keys and values into the cache, then attend. Returns [T, H, V]."""
        batch, key_cache, value_cache = self._step.batch, self._key_cache, self._value_cache
        assert batch is not None and key_cache is not None and value_cache is not None, "no step, or no cache"
        key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, batch.slots_T, key_TKD)
        value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, batch.slots_T, value_TKV)
        return self._backend(query_THD, key_cache, value_cache, batch, scale, sliding_window, sinks_H)


def pick_backend(device: torch.device) -> Backend:
    """The fastest attention for the device: a Triton kernel on a GPU, where its torch brought Triton along."""
    if _has_triton(device.type):
        from phalanx.models import attention_triton

        return attention_triton.paged_attention
    from phalanx.models import attention_torch

    return attention_torch.paged_attention


def import_backend(device_type: str) -> None:
    """Import the attention for such a device, and do what it can do before a process has one: forked ones have it."""
    if _has_triton(device_type):
        from phalanx.models import attention_triton

        attention_triton.get_ready()


def register() -> None:
    """Make our attention known to transformers. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


def _has_triton(device_type: str) -> bool:
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


def _attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTV: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: returns [1, T, H, V], and no attention weights. `s_aux` is its name for sinks."""
    assert attention_mask is None
    attention = module.paged_attention
    assert isinstance(attention, PagedAttention)
    out_THV = attention(
        query_1HTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTV[0].transpose(0, 1),
        scaling,
        sliding_window,
        s_aux,
    )
    return out_THV[None], None
