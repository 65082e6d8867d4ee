"""What the ranks of an all_to_all write down for each other."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.collectives.layout import MAX_RANKS, Layout
from phalanx.collectives.row_counts import Disagreement, RowCounts, RowTable, compare, compare_all


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 9) | st.just(MAX_RANKS), parity=st.sampled_from([0, 1]), seed=st.integers(0, 2**20))
def test_each_rank_reads_what_all_have_written(size: int, parity: int, seed: int) -> None:
    rng = random.Random(seed)
    sent = [[rng.choice([0, 0, 1, 7, 2**31]) for _ in range(size)] for _ in range(size)]
    counts = [RowCounts(sent[rank], [row[rank] for row in sent]) for rank in range(size)]
    layout = Layout(size, 0)
    words = memoryview(bytearray(layout.data)).cast("Q")
    tables = [RowTable(words, layout, rank) for rank in range(size)]
    for of_parity in (1 - parity, parity):
        for rank, table in enumerate(tables):
            table.write(of_parity, counts[rank] if of_parity == parity else RowCounts([9] * size, [9] * size))
    assert tables[seed % size].read(parity) == counts
    assert compare_all(counts) is None
    sender, receiver = rng.randrange(size), rng.randrange(size)
    num_sent = sent[sender][receiver]
    counts[receiver].receive[sender] += 1  # type: ignore[index]
    assert compare_all(counts) == Disagreement(sender, receiver, num_sent, num_sent + 1)


def test_a_disagreement_names_sender_and_receiver_by_their_global_ranks() -> None:
    counts = RowCounts(send=[4, 0, 2], receive=[4, 1, 5])
    assert compare(0, counts, 1, sent=1, expected=0) is None
    assert compare(0, counts, 2, sent=5, expected=3) == Disagreement(0, 2, 2, 3)
    assert compare(0, counts, 2, sent=6, expected=2) == Disagreement(2, 0, 6, 5)
    assert Disagreement(2, 0, 6, 5).describe((8, 9, 12)) == "rank 12 sends 6 rows to rank 8, which expects 5"


@pytest.mark.parametrize(
    ("send", "receive"),
    [([3, 2], [3]), ([3, 3], [3, 0]), ([6, -1], [6, 0]), ([3, 2], [2, 2])],
    ids=["ranks", "rows", "negative", "own"],
)
def test_counts_that_cannot_be_are_our_mistake(send: list[int], receive: list[int]) -> None:
    RowCounts([3, 2], [3, 0]).check(5, rank=0, size=2)
    with pytest.raises(AssertionError):
        RowCounts(send, receive).check(5, rank=0, size=2)
