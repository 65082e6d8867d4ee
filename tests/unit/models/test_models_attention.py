"""Paged attention equals plain attention over each row's own tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.models import attention_torch
from phalanx.models.attention import PagedAttention, Step, pick_backend
from phalanx.models.attention_batch import AttentionBatch

CPU = torch.device("cpu")
NOWHERE = 1 << 20

rows_of_work = st.lists(
    st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 2, 5, 33])), min_size=1, max_size=6
)  # (tokens before, new tokens)


def plain_attention(
    query_THD: Tensor,
    key_CKD: Tensor,
    value_CKV: Tensor,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One row, in float64, with all scores at once."""
    group_size = query_THD.shape[1] // key_CKD.shape[1]
    num_new, num_tokens = len(query_THD), len(key_CKD)
    position_T1 = torch.arange(num_tokens - num_new, num_tokens)[:, None]
    is_seen_TC = (torch.arange(num_tokens) <= position_T1) & (
        torch.arange(num_tokens) > position_T1 - (window or num_tokens)
    )
    key_CHD, value_CHV = (cache.double().repeat_interleave(group_size, dim=1) for cache in (key_CKD, value_CKV))
    score_HTC = torch.einsum("thd,chd->htc", query_THD.double(), key_CHD) * scale
    score_HTC = score_HTC.masked_fill(~is_seen_TC, -math.inf)
    if sinks_H is not None:
        sink_HT1 = sinks_H.double()[:, None, None].expand(-1, num_new, 1)
        score_HTC = torch.cat((score_HTC, sink_HT1), -1)
    weight_HTC = score_HTC.softmax(-1)[..., :num_tokens]
    return torch.einsum("htc,chv->thv", weight_HTC, value_CHV).float()


def make_case(
    work: list[tuple[int, int]], heads: tuple[int, int], dims: tuple[int, int], block_size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch, list[tuple[Tensor, Tensor, Tensor]]]:
    """A cache full of NaN but for the rows' tokens, which lie in blocks in random order."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    work = sorted(work, key=lambda row: row[1] > 1)
    (num_heads, num_kv_heads), (key_dim, value_dim) = heads, dims
    context_lens = [earlier + new for earlier, new in work]
    num_blocks = [-(-length // block_size) for length in context_lens]
    blocks = rng.permutation(sum(num_blocks) + 3)
    key_cache = torch.full((len(blocks), block_size, num_kv_heads, key_dim), float("nan"))
    value_cache = torch.full((len(blocks), block_size, num_kv_heads, value_dim), float("nan"))
    tables = np.full((len(work), max(num_blocks) + 1), NOWHERE)
    rows, slots = [], []
    for row, ((earlier, new), count) in enumerate(zip(work, num_blocks, strict=True)):
        tables[row, :count], blocks = blocks[:count], blocks[count:]
        positions = np.arange(earlier + new)
        slots_C = tables[row, positions // block_size] * block_size + positions % block_size
        key_CKD = torch.randn(earlier + new, num_kv_heads, key_dim)
        value_CKV = torch.randn(earlier + new, num_kv_heads, value_dim)
        key_cache.view(-1, num_kv_heads, key_dim)[slots_C] = key_CKD
        value_cache.view(-1, num_kv_heads, value_dim)[slots_C] = value_CKV
        rows.append((torch.randn(new, num_heads, key_dim), key_CKD, value_CKV))
        slots.append(slots_C[earlier:])
    batch = AttentionBatch(
        query_starts_R1=torch.tensor(np.cumsum([0, *[new for _, new in work]]), dtype=torch.int32),
        context_lens_R=torch.tensor(context_lens, dtype=torch.int32),
        block_tables_RB=torch.tensor(tables, dtype=torch.int32),
        slots_T=torch.tensor(np.concatenate(slots)),
        max_query_len=max(new for _, new in work),
        max_context_len=max(context_lens),
        num_decodes=sum(new == 1 for _, new in work),
        block_size=block_size,
    )
    return torch.cat([query for query, _, _ in rows]), key_cache, value_cache, batch, rows


@settings(max_examples=60, deadline=None)
@given(
    work=rows_of_work,
    heads=st.sampled_from([(4, 4), (6, 2), (9, 3), (3, 1)]),
    dims=st.sampled_from([(16, 16), (24, 8)]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 7, 20, 1000]),
    has_sinks=st.booleans(),
    limits=st.sampled_from([(8192, 256), (40, 8)]),
    seed=st.integers(0, 1000),
)
def test_any_mix_of_rows(
    work: list[tuple[int, int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    window: int | None,
    has_sinks: bool,
    limits: tuple[int, int],
    seed: int,
) -> None:
    query_THD, key_cache, value_cache, batch, rows = make_case(work, heads, dims, block_size, seed)
    scale = 1 / math.sqrt(dims[0])
    sinks_H = torch.randn(heads[0]) * 2 if has_sinks else None
    expected = torch.cat([plain_attention(*row, scale, window, sinks_H) for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_torch, "MAX_CHUNK_TOKENS", limits[0])
        patch.setattr(attention_torch, "TILE_QUERIES", limits[1])
        found = attention_torch.paged_attention(query_THD, key_cache, value_cache, batch, scale, window, sinks_H)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_layers_of_one_step_share_what_is_prepared() -> None:
    query_THD, key_cache, value_cache, batch, _ = make_case([(30, 1), (5, 9)], (6, 2), (16, 16), 8, 0)
    for window in (None, None, 8, 8):
        attention_torch.paged_attention(query_THD, key_cache, value_cache, batch, 1.0, window)
    assert len(batch.prepared) == 2


def test_new_keys_and_values_are_put_into_the_cache_first() -> None:
    _, key_cache, value_cache, batch, rows = make_case([(9, 1), (0, 6)], (2, 2), (8, 8), 4, 1)
    key_TKD = torch.cat([key_CKD[-len(query) :] for query, key_CKD, _ in rows])
    value_TKV = torch.cat([value_CKV[-len(query) :] for query, _, value_CKV in rows])
    expected_key, expected_value = key_cache.clone(), value_cache.clone()
    for cache in (key_cache, value_cache):
        cache.view(-1, 2, 8)[batch.slots_T] = float("nan")
    step = Step()
    step.batch = batch
    attention = PagedAttention(step, pick_backend(CPU))
    attention.bind(key_cache, value_cache)
    out_THV = attention(torch.cat([query for query, _, _ in rows]), key_TKD, value_TKV, 1.0, None)
    assert torch.equal(key_cache.nan_to_num(), expected_key.nan_to_num())
    assert torch.equal(value_cache.nan_to_num(), expected_value.nan_to_num())
    assert out_THV.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 16, 17])
def test_one_row_fills_the_first_blocks(num_tokens: int) -> None:
    batch = AttentionBatch.of_one_row(num_tokens, 16, CPU)
    assert batch.slots_T.tolist() == list(range(num_tokens))
    assert batch.block_tables_RB.tolist() == [list(range(-(-num_tokens // 16)))]
    assert batch.num_decodes == (num_tokens == 1)
