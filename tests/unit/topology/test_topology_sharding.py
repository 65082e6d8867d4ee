"""Shares cover everything once, and no rank goes without a head."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.topology.sharding import ALIGNMENT, Span, shard_heads, split, split_columns, vocab_part


@given(size=st.integers(0, 500), num_ranks=st.integers(1, 16))
def test_split_covers_all_in_order_and_evenly(size: int, num_ranks: int) -> None:
    spans = [split(size, num_ranks, rank) for rank in range(num_ranks)]
    assert [i for span in spans for i in range(*span)] == list(range(size))
    assert max(span.size for span in spans) - min(span.size for span in spans) <= 1


@given(size=st.integers(1, 5000), num_ranks=st.integers(1, 16))
def test_columns_cover_all_and_leave_no_rank_without(size: int, num_ranks: int) -> None:
    if size < num_ranks:
        with pytest.raises(ConfigError, match="tensor_parallel_size"):
            split_columns(size, num_ranks, 0)
        return
    spans = [split_columns(size, num_ranks, rank) for rank in range(num_ranks)]
    assert [i for span in spans for i in range(*span)] == list(range(size))
    assert min(span.size for span in spans) > 0


def test_columns_are_aligned_where_they_can_be() -> None:
    assert [split_columns(1536, 4, rank).size for rank in range(4)] == [384] * 4
    assert [split_columns(1000, 3, rank).size for rank in range(3)] == [336, 336, 328]
    assert [split_columns(97, 2, rank).size for rank in range(2)] == [49, 48]
    assert [split_columns(24, 4, rank).size for rank in range(4)] == [8, 8, 4, 4]


@given(num_kv_heads=st.integers(1, 8), group_size=st.integers(1, 8), num_ranks=st.integers(1, 16))
def test_heads_are_shared_out(num_kv_heads: int, group_size: int, num_ranks: int) -> None:
    num_query_heads = num_kv_heads * group_size
    if num_ranks > num_query_heads:
        with pytest.raises(ConfigError, match=f"at most {num_query_heads}"):
            shard_heads(num_query_heads, num_kv_heads, num_ranks, 0)
        return
    shards = [shard_heads(num_query_heads, num_kv_heads, num_ranks, rank) for rank in range(num_ranks)]
    assert [head for shard in shards for head in range(*shard.query)] == list(range(num_query_heads))
    assert {head for shard in shards for head in range(*shard.kv)} == set(range(num_kv_heads))
    for shard in shards:
        assert shard.query.size > 0 and shard.kv.size > 0
        assert shard.query.size % shard.kv.size == 0
        per_kv_head = shard.query.size // shard.kv.size
        for i, head in enumerate(range(*shard.query)):
            assert head // group_size == shard.kv.start + i // per_kv_head, "a query head beside a foreign KV head"


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (2, [((0, 6), (0, 2)), ((6, 9), (2, 3))]),
        (4, [((0, 2), (0, 1)), ((2, 3), (0, 1)), ((3, 6), (1, 2)), ((6, 9), (2, 3))]),
    ],
)
def test_nine_query_and_three_kv_heads(num_ranks: int, expected: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    assert [shard_heads(9, 3, num_ranks, rank) for rank in range(num_ranks)] == expected


@given(vocab_size=st.integers(1, 5000), num_ranks=st.integers(1, 16))
def test_vocabulary_parts_hold_it(vocab_size: int, num_ranks: int) -> None:
    part = vocab_part(vocab_size, num_ranks)
    assert vocab_size <= part * num_ranks < vocab_size + num_ranks * (ALIGNMENT + 1)


def test_intersection_of_spans() -> None:
    assert Span(2, 6).intersection(Span(4, 9)) == (4, 6)
    assert Span(2, 6).intersection(Span(7, 9)).size == 0
    assert Span(7, 9).intersection(Span(2, 6)).size == 0
