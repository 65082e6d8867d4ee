"""Attention over the paged KV cache, where transformers' model definitions call for attention.

transformers looks attention up by name; ours is `phalanx`. As no mask function has that name, no mask is built. A
model sees the step's tokens as one long sequence [1, H, T, D]; which rows they make up, and where their context lies,
is in the step's AttentionBatch.

Shape suffixes: T tokens of the step, R rows, B blocks of a row, H query heads, K KV heads, D head size, V value size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "phalanx"
"""The name under which transformers finds our attention."""


@dataclass(slots=True)
class AttentionBatch:
    """The rows of one step. Rows with one new token come first.

    Numbers that decide shapes are on the host, so that a GPU is not waited for.
    """

    query_starts_R1: Tensor
    """int32. Row r has the step's tokens from query_starts_R1[r] up to query_starts_R1[r + 1]."""
    context_lens_R: Tensor
    """int32. Tokens of each row that the cache holds after this step, the new ones among them."""
    block_tables_RB: Tensor
    """int32 block ids. What is beyond a row's context is never read."""
    slots_T: Tensor
    """int64. Where each new token goes in the cache: block * block_size + offset."""
    max_query_len: int
    max_context_len: int
    num_decodes: int
    """Rows with one new token."""
    block_size: int
    prepared: dict[object, Any] = field(default_factory=dict)
    """What a backend has worked out for this step, kept from the first layer for the others."""

    @classmethod
    def of_one_row(cls, num_tokens: int, block_size: int, device: torch.device) -> AttentionBatch:
        """A prompt without context, in the cache's first blocks."""
        num_blocks = -(-num_tokens // block_size)
        return cls(
            query_starts_R1=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            context_lens_R=torch.tensor([num_tokens], dtype=torch.int32, device=device),
            block_tables_RB=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            slots_T=torch.arange(num_tokens, device=device),
            max_query_len=num_tokens,
            max_context_len=num_tokens,
            num_decodes=int(num_tokens == 1),
            block_size=block_size,
        )


Backend = Callable[[Tensor, Tensor, Tensor, AttentionBatch, float, int | None], Tensor]
"""(query_THD, key_cache, value_cache, batch, scale, sliding_window) -> [T, H, V].

Causal attention of each row's new tokens over its whole context, whose keys and values are in the caches already:
[num_blocks, block_size, K, D] and [num_blocks, block_size, K, V]. A token sees the last `sliding_window` tokens, itself
among them, or all."""


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

    def __call__(
        self, query_THD: Tensor, key_TKD: Tensor, value_TKV: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Put the new keys and values into the cache, then attend. Returns [T, H, V]."""
        batch, key_cache, value_cache = self._step.batch, self._key_cache, self._value_cache
        assert batch is not None and key_cache is not None and value_cache is not None, "no step, or no cache"
        key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, batch.slots_T, key_TKD)
        value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, batch.slots_T, value_TKV)
        return self._backend(query_THD, key_cache, value_cache, batch, scale, sliding_window)


def pick_backend(device: torch.device) -> Backend:
    """The fastest attention for the device: a Triton kernel on a GPU, where its torch brought Triton along."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from phalanx.models import attention_triton

        return attention_triton.paged_attention
    from phalanx.models import attention_torch

    return attention_torch.paged_attention


def register() -> None:
    """Make our attention known to transformers. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


def _attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTV: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: returns [1, T, H, V], and no attention weights."""
    assert attention_mask is None
    attention = module.paged_attention
    assert isinstance(attention, PagedAttention)
    out_THV = attention(
        query_1HTD[0].transpose(0, 1),
        key_1KTD[0].transpose(0, 1),
        value_1KTV[0].transpose(0, 1),
        scaling,
        sliding_window,
    )
    return out_THV[None], None
