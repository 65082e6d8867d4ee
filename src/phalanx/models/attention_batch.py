"""The rows of one step, as attention sees them, and what computes attention over them.

Shape suffixes: T tokens of the step, R rows, B blocks of a row, H query heads, K KV heads, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


Backend = Callable[[Tensor, Tensor, Tensor, AttentionBatch, float, int | None, Tensor | None], Tensor]
"""(query_THD, key_cache, value_cache, batch, scale, sliding_window, sinks_H) -> [T, H, V].

Causal attention of each row's new tokens over its whole context, whose keys and values are in the caches already:
[num_blocks, block_size, K, D] and [num_blocks, block_size, K, V]. A token sees the last `sliding_window` tokens, itself
among them, or all.

With sinks, every head has one more thing to look at, which has a score and no value (Xiao et al. 2023; gpt-oss)."""
