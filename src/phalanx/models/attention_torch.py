"""Attention over the paged cache with torch's own operations, on any device.

Keys and values are gathered block by block and given to scaled_dot_product_attention. On a GPU this waits for the
device once a step; attention there deserves a kernel.

Shape suffixes: T tokens of the step, R rows of a chunk, B blocks a row, L = B * block_size, H query heads, K KV heads,
G = H / K, D head size, V value size, Q queries of a tile, C context, M gathered positions without a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phalanx.models.attention_batch import AttentionBatch

MAX_CHUNK_TOKENS = 8192
"""Context tokens gathered at a time for decoding rows: some megabytes, so that the allocator uses its memory again.
What is larger than 32 MiB glibc maps anew each time: 43 ms instead of 3 ms, measured."""

MAX_PADDING = 2
"""Rows are padded to the longest of their chunk, which is at most this many times the shortest."""

TILE_QUERIES = 256
"""Queries that share a mask. Context that none of them sees is left out."""


@dataclass(frozen=True, slots=True)
class _DecodeChunk:
    """Rows with one query each, of similar context, padded to the same number of blocks."""

    num_rows: int
    tokens_R: Tensor | None
    """None for all of the step's tokens."""
    blocks_N: Tensor
    empty_M: Tensor
    mask_R11L: Tensor


class _PrefillRow(NamedTuple):
    """A row with several queries: the step's tokens from `start` to `stop`."""

    start: int
    stop: int
    num_earlier: int
    """Context before the first query."""
    first_seen: int
    """Context before this is seen by no query; a multiple of the block size."""
    blocks_B: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    chunks: list[_DecodeChunk]
    rows: list[_PrefillRow]


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """See `attention_batch.Backend`."""
    key = (sliding_window, query_THD.dtype)
    plan = batch.prepared.get(key)
    if plan is None:
        plan = batch.prepared[key] = _prepare(batch, sliding_window, query_THD.dtype, query_THD.device)
    sinks_KG = None if sinks_H is None else sinks_H.view(key_cache.shape[2], -1)
    out_THV = query_THD.new_empty(*query_THD.shape[:2], value_cache.shape[-1])
    for chunk in plan.chunks:
        if chunk.tokens_R is None:
            return _decode(query_THD, key_cache, value_cache, chunk, scale, sinks_KG)
        out_THV[chunk.tokens_R] = _decode(query_THD[chunk.tokens_R], key_cache, value_cache, chunk, scale, sinks_KG)
    for row in plan.rows:
        out_THV[row.start : row.stop] = _prefill(
            query_THD[row.start : row.stop], key_cache, value_cache, row, scale, sliding_window, sinks_KG
        )
    return out_THV


def _decode(
    query_RHD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    chunk: _DecodeChunk,
    scale: float,
    sinks_KG: Tensor | None,
) -> Tensor:
    num_rows, num_heads, head_dim = query_RHD.shape
    num_kv_heads = key_cache.shape[2]
    key_RKLD = _gather_chunk(key_cache, chunk)
    value_RKLV = _gather_chunk(value_cache, chunk)
    # The query heads of a KV head stand as its rows: with enable_gqa and one row, a CPU takes 7 to 13 times as long.
    query_RKGD = query_RHD.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks_KG1 = None if sinks_KG is None else sinks_KG[..., None]
    out_RKGV = _attend(query_RKGD, key_RKLD, value_RKLV, chunk.mask_R11L, scale, sinks_KG1)
    return out_RKGV.reshape(num_rows, num_heads, -1)


def _gather_chunk(cache: Tensor, chunk: _DecodeChunk) -> Tensor:
    """[R, K, L, D] from the rows' blocks. Where there is no token there are zeros: a masked NaN would still be NaN."""
    gathered = cache.index_select(0, chunk.blocks_N)
    gathered.view(-1, *cache.shape[2:]).index_fill_(0, chunk.empty_M, 0)
    return gathered.view(chunk.num_rows, -1, *cache.shape[2:]).transpose(1, 2)


def _prefill(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    row: _PrefillRow,
    scale: float,
    sliding_window: int | None,
    sinks_KG: Tensor | None,
) -> Tensor:
    num_queries, num_heads, head_dim = query_THD.shape
    num_kv_heads = key_cache.shape[2]
    query_GKTD = query_THD.reshape(num_queries, num_kv_heads, -1, head_dim).permute(2, 1, 0, 3)
    key_GKCD = _gather_row(key_cache, row, query_GKTD.shape[0])
    value_GKCV = _gather_row(value_cache, row, query_GKTD.shape[0])
    sinks_GK11 = None if sinks_KG is None else sinks_KG.T[..., None, None]
    if row.num_earlier == 0 and sliding_window is None and sinks_KG is None:
        out_GKTV = scaled_dot_product_attention(query_GKTD, key_GKCD, value_GKCV, is_causal=True, scale=scale)
        return out_GKTV.permute(2, 1, 0, 3).reshape(num_queries, num_heads, -1)
    tiles = []
    for start in range(0, num_queries, TILE_QUERIES):
        stop = min(start + TILE_QUERIES, num_queries)
        first, last = row.num_earlier + start, row.num_earlier + stop
        seen_from = max(first - sliding_window + 1, row.first_seen) if sliding_window else row.first_seen
        context = slice(seen_from - row.first_seen, last - row.first_seen)
        out_GKQV = _attend(
            query_GKTD[:, :, start:stop],
            key_GKCD[:, :, context],
            value_GKCV[:, :, context],
            _causal_mask(first, last, seen_from, sliding_window, query_THD.device),
            scale,
            sinks_GK11,
        )
        tiles.append(out_GKQV.permute(2, 1, 0, 3).reshape(stop - start, num_heads, -1))
    return torch.cat(tiles)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """scaled_dot_product_attention, which knows no sinks: they add to what the weights are divided by, and no value.

    `sinks` has a score for each head, in a shape that broadcasts to the scores.
    """
    if sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    score = (query @ key.transpose(-1, -2)).float() * scale
    score = score.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score + mask
    best = torch.maximum(score.amax(-1, keepdim=True), sinks.float())
    weight = torch.exp(score - best)
    total = weight.sum(-1, keepdim=True) + torch.exp(sinks.float() - best)
    return (weight / total).to(value.dtype) @ value


def _gather_row(cache: Tensor, row: _PrefillRow, group_size: int) -> Tensor:
    """[G, K, C, D]: the row's context from `first_seen` on, the same for each of the group's query heads."""
    context_len = row.num_earlier + row.stop - row.start - row.first_seen
    gathered_CKD = cache.index_select(0, row.blocks_B).view(-1, *cache.shape[2:])[:context_len]
    return gathered_CKD.transpose(0, 1)[None].expand(group_size, -1, -1, -1)


def _causal_mask(first: int, last: int, seen_from: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[Q, C] of bool: whether the query at position first + q sees the key at position seen_from + c."""
    query_Q1 = torch.arange(first, last, device=device)[:, None]
    key_1C = torch.arange(seen_from, last, device=device)[None]
    is_seen_QC = key_1C <= query_Q1
    return is_seen_QC & (key_1C > query_Q1 - sliding_window) if sliding_window else is_seen_QC


def _prepare(batch: AttentionBatch, sliding_window: int | None, dtype: torch.dtype, device: torch.device) -> _Plan:
    starts_R1 = batch.query_starts_R1.cpu().numpy().astype(np.int64)
    context_lens_R = batch.context_lens_R.cpu().numpy().astype(np.int64)
    tables_RB = batch.block_tables_RB.cpu().numpy().astype(np.int64)
    chunks = [
        _decode_chunk(rows_R, starts_R1, context_lens_R, tables_RB, batch.block_size, sliding_window, dtype, device)
        for rows_R in _chunk_rows(_num_seen(context_lens_R[: batch.num_decodes], sliding_window))
    ]
    rows = [
        _prefill_row(
            int(starts_R1[row]),
            int(starts_R1[row + 1]),
            int(context_lens_R[row]),
            tables_RB[row],
            batch,
            sliding_window,
        )
        for row in range(batch.num_decodes, len(context_lens_R))
    ]
    return _Plan(chunks, rows)


def _num_seen(context_lens_R: NDArray[np.int64], sliding_window: int | None) -> NDArray[np.int64]:
    return np.minimum(context_lens_R, sliding_window) if sliding_window else context_lens_R


def _chunk_rows(num_seen_R: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Decoding rows by length, cut into chunks of similar length and bounded size."""
    order = np.argsort(num_seen_R, kind="stable")[::-1]
    chunks, begin = [], 0
    for end in range(1, len(order) + 1):
        longest = num_seen_R[order[begin]]
        if (
            end == len(order)
            or num_seen_R[order[end]] * MAX_PADDING < longest
            or (end + 1 - begin) * longest > MAX_CHUNK_TOKENS
        ):
            chunks.append(np.sort(order[begin:end]))
            begin = end
    return chunks


def _decode_chunk(
    rows_R: NDArray[np.int64],
    starts_R1: NDArray[np.int64],
    context_lens_R: NDArray[np.int64],
    tables_RB: NDArray[np.int64],
    block_size: int,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> _DecodeChunk:
    lens_R1 = context_lens_R[rows_R][:, None]
    first_seen_R1 = lens_R1 - _num_seen(lens_R1, sliding_window)
    first_block_R1 = first_seen_R1 // block_size
    num_blocks = int((-(-lens_R1 // block_size) - first_block_R1).max())
    blocks_RB = first_block_R1 + np.arange(num_blocks)
    # Beyond its context a row's table holds anything: gather the row's last block again instead.
    blocks_RB = np.minimum(blocks_RB, (lens_R1 - 1) // block_size)
    positions_RL = first_block_R1 * block_size + np.arange(num_blocks * block_size)
    is_seen_RL = (positions_RL >= first_seen_R1) & (positions_RL < lens_R1)
    mask_RL = torch.zeros(is_seen_RL.shape, dtype=dtype).masked_fill_(torch.from_numpy(~is_seen_RL), float("-inf"))
    is_whole_step = len(rows_R) == starts_R1[-1]
    return _DecodeChunk(
        num_rows=len(rows_R),
        tokens_R=None if is_whole_step else torch.from_numpy(starts_R1[rows_R]).to(device),
        blocks_N=torch.from_numpy(tables_RB[rows_R[:, None], blocks_RB].reshape(-1)).to(device),
        empty_M=torch.from_numpy(np.flatnonzero(positions_RL >= lens_R1)).to(device),
        mask_R11L=mask_RL[:, None, None].to(device),
    )


def _prefill_row(
    start: int,
    stop: int,
    context_len: int,
    table_B: NDArray[np.int64],
    batch: AttentionBatch,
    sliding_window: int | None,
) -> _PrefillRow:
    num_earlier = context_len - (stop - start)
    first_block = max(num_earlier - sliding_window + 1, 0) // batch.block_size if sliding_window else 0
    blocks_B = table_B[first_block : -(-context_len // batch.block_size)]
    return _PrefillRow(
        start=start,
        stop=stop,
        num_earlier=num_earlier,
        first_seen=first_block * batch.block_size,
        blocks_B=torch.from_numpy(blocks_B).to(batch.slots_T.device),
    )
