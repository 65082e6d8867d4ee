"""Attention over the paged cache on NVIDIA GPUs: one Triton kernel for prefill, chunked prefill and decode.

The queries of one row are cut into tiles; a tile takes some consecutive tokens with all query heads that share a KV
head, so that keys and values are read once for the whole group. Softmax runs online over the blocks of the context
(Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention), in float32.

Legend: T tokens of the step, H query heads, K KV heads, D head size, V value size, M rows of a tile, N context tile.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.models.attention_batch import AttentionBatch

CONTEXT_TILE = 64
LARGE_TILE_BYTES = 128
"""A tile whose queries take more than this in one column (64 rows of float32) is given half as much context at a time.
With all of it and heads of 128, consumer GPUs have too little shared memory (99 KiB), and others too few registers:
prefill takes 1.4 times as long on an H100, with heads of 64 ten times."""

NO_WINDOW = 1 << 30


def get_ready() -> None:
    """Have Triton do what it does once in a process and needs no GPU for: read all of itself for the key of its cache,
    and import what arguments are compared with at the first launch. Takes up to half a second.

    These are none of Triton's public names. Where it has others, each process does it at its first launch.
    """
    with suppress(ImportError):
        importlib.import_module("triton.experimental.gluon")
        from triton.runtime.cache import triton_key

        triton_key()


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's new tokens over its whole context, whose keys and values are in the cache already.

    Caches are [num_blocks, block_size, K, D] and [num_blocks, block_size, K, V]; returns [T, H, V]. Waits for nothing.
    Sinks take part in the softmax as a first score without a value.
    """
    num_tokens, num_heads, head_dim = query_THD.shape
    block_size, num_kv_heads, value_dim = value_cache.shape[1:]
    group = num_heads // num_kv_heads
    num_rows = batch.context_lens_R.shape[0]
    tile_rows = (
        max(16, triton.next_power_of_2(group)) if batch.max_query_len == 1 else max(64, triton.next_power_of_2(group))
    )
    queries_per_tile = tile_rows // group
    out_THV = torch.empty(num_tokens, num_heads, value_dim, dtype=query_THD.dtype, device=query_THD.device)
    # Row r begins at tile query_starts[r] // queries_per_tile + r: an upper bound that needs no look at the device.
    grid = (num_tokens // queries_per_tile + num_rows, num_kv_heads)
    _paged_attention[grid](
        out_THV,
        query_THD,
        key_cache,
        value_cache,
        batch.block_tables_RB,
        batch.query_starts_R1,
        batch.context_lens_R,
        sinks_H,
        scale,
        num_rows,
        sliding_window or NO_WINDOW,
        query_THD.stride(0),
        query_THD.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        batch.block_tables_RB.stride(0),
        HAS_SINKS=sinks_H is not None,
        GROUP=group,
        QUERIES=queries_per_tile,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_SIZE=block_size,
        TILE_M=tile_rows,
        TILE_D=max(16, triton.next_power_of_2(head_dim)),
        TILE_V=max(16, triton.next_power_of_2(value_dim)),
        TILE_N=CONTEXT_TILE if tile_rows * query_THD.element_size() <= LARGE_TILE_BYTES else CONTEXT_TILE // 2,
        PRECISION="ieee" if query_THD.dtype == torch.float32 else "tf32",
    )
    return out_THV


@triton.jit
def _row_of_tile(tile, query_starts, num_rows, QUERIES: tl.constexpr):
    """The last row that begins at or before `tile`, by bisection."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        begins = tl.load(query_starts + middle) // QUERIES + middle
        if begins <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _paged_attention(
    out,
    query,
    key_cache,
    value_cache,
    block_tables,
    query_starts,
    context_lens,
    sinks,
    scale,
    num_rows,
    window,
    query_stride_t,
    query_stride_h,
    key_stride_b,
    key_stride_s,
    key_stride_k,
    value_stride_b,
    value_stride_s,
    value_stride_k,
    table_stride,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = _row_of_tile(tile, query_starts, num_rows, QUERIES)
    row_start = tl.load(query_starts + row)
    query_len = tl.load(query_starts + row + 1) - row_start
    first_query = (tile - row_start // QUERIES - row) * QUERIES
    if first_query >= query_len:
        return
    context_len = tl.load(context_lens + row)

    m = tl.arange(0, TILE_M)
    d = tl.arange(0, TILE_D)
    v = tl.arange(0, TILE_V)
    query_m = first_query + m // GROUP
    head_m = kv_head * GROUP + m % GROUP
    is_query_m = (m // GROUP < QUERIES) & (query_m < query_len)
    position_m = context_len - query_len + query_m
    token_m = (row_start + query_m).to(tl.int64)
    q_MD = tl.load(
        query + token_m[:, None] * query_stride_t + head_m[:, None] * query_stride_h + d[None, :],
        mask=is_query_m[:, None] & (d[None, :] < HEAD_DIM),
        other=0.0,
    )

    if HAS_SINKS:
        best_M = tl.load(sinks + head_m).to(tl.float32)
        total_M = tl.full([TILE_M], 1.0, tl.float32)
    else:
        best_M = tl.full([TILE_M], float("-inf"), tl.float32)
        total_M = tl.zeros([TILE_M], tl.float32)
    sum_MV = tl.zeros([TILE_M, TILE_V], tl.float32)
    first_position = context_len - query_len + first_query
    end = tl.minimum(context_len, first_position + QUERIES)
    begin = tl.maximum(first_position - window + 1, 0) // TILE_N * TILE_N
    for start in range(begin, end, TILE_N):
        n = start + tl.arange(0, TILE_N)
        is_context_n = n < end
        block_n = tl.load(block_tables + row * table_stride + n // BLOCK_SIZE, mask=is_context_n, other=0).to(tl.int64)
        offset_n = n % BLOCK_SIZE
        k_ND = tl.load(
            key_cache
            + block_n[:, None] * key_stride_b
            + offset_n[:, None] * key_stride_s
            + kv_head * key_stride_k
            + d[None, :],
            mask=is_context_n[:, None] & (d[None, :] < HEAD_DIM),
            other=0.0,
        )
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale
        is_seen_MN = (n[None, :] <= position_m[:, None]) & (n[None, :] > position_m[:, None] - window)
        score_MN = tl.where(is_seen_MN, score_MN, float("-inf"))
        # A row whose window begins later has seen nothing yet: -inf - -inf would be NaN.
        new_best_M = tl.maximum(best_M, tl.max(score_MN, 1))
        shift_M = tl.where(new_best_M == float("-inf"), 0.0, new_best_M)
        weight_MN = tl.exp(score_MN - shift_M[:, None])
        decay_M = tl.exp(best_M - shift_M)
        v_NV = tl.load(
            value_cache
            + block_n[:, None] * value_stride_b
            + offset_n[:, None] * value_stride_s
            + kv_head * value_stride_k
            + v[None, :],
            mask=is_context_n[:, None] & (v[None, :] < VALUE_DIM),
            other=0.0,
        )
        total_M = total_M * decay_M + tl.sum(weight_MN, 1)
        sum_MV = sum_MV * decay_M[:, None] + tl.dot(weight_MN.to(v_NV.dtype), v_NV, input_precision=PRECISION)
        best_M = new_best_M

    num_heads = tl.num_programs(1) * GROUP
    tl.store(
        out + (token_m[:, None] * num_heads + head_m[:, None]) * VALUE_DIM + v[None, :],
        (sum_MV / total_M[:, None]).to(out.dtype.element_ty),
        mask=is_query_m[:, None] & (v[None, :] < VALUE_DIM),
    )
