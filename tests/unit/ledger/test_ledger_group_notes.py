"""There are two ways to note a collective, a short one and one for every case: nobody who reads sees which it was."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_ranks import Named

from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES, NUM_RECORDS
from phalanx.ledger.journal_reader import read
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigests

NUM_GROUPS = 2


class Rank:
    """One that notes in the one way or in the other."""

    def __init__(self, *, at_length: bool, compares: bool, has_device: bool = False) -> None:
        self.memory, self.board = memoryview(bytearray(JOURNAL_BYTES)), memoryview(bytearray(BOARD_BYTES))
        clock = count(1000)
        self.journal = Journal(self.memory, epoch=7, now_ns=lambda: next(clock))
        if at_length:
            self.journal.fence_stores = lambda: None
        self.marks: list[tuple[str, int]] = []
        """What a device was told to write."""
        if has_device:
            self.journal.follow_device(partial(self._mark, "begun"), partial(self._mark, "finished"))
        self.digests = StepDigests(self.board, NUM_GROUPS) if compares else None
        self.groups = [group_notes(index, self.journal, self.digests) for index in range(1, 1 + NUM_GROUPS)]
        self._steps = count(1)

    def _mark(self, what: str, number: int) -> None:
        self.marks.append((what, number))

    def begin(self) -> None:
        step = next(self._steps)
        if self.digests is not None:
            self.digests.begin(step)
        self.journal.begin_step(step, 9, num_tokens=1)

    def leave(self) -> None:
        self.journal.leave_step()
        if self.digests is not None:
            self.digests.leave()


class Collective(NamedTuple):
    group: int
    digest: int
    end: str

    def do(self, rank: Rank) -> None:
        notes = rank.groups[self.group]
        collective = Named(self.digest, f"{self.digest:x}")
        notes.explain(collective)
        if self.end == "captured":
            notes.note_captured(1, collective)
            return
        notes.issue(collective)
        if self.end == "done":
            notes.done()
        if self.end in ("failed", "done"):  # what is over stays so
            notes.failed()


collectives = st.builds(
    Collective,
    st.integers(0, NUM_GROUPS - 1),
    st.integers(1, 2**64 - 1),
    st.sampled_from(["done", "failed", "open", "captured"]),
)
programs = st.lists(st.one_of(collectives, st.sampled_from(["begin", "leave"])), max_size=30)


@given(programs, st.booleans(), st.booleans())
def test_both_ways_write_the_same(program: list[Collective | str], compares: bool, has_device: bool) -> None:
    ranks = [Rank(at_length=at_length, compares=compares, has_device=has_device) for at_length in (False, True)]
    assert type(ranks[0].groups[0]) is not type(ranks[1].groups[0])
    for rank in ranks:
        is_in_step = False
        for one in program:
            if isinstance(one, Collective):
                one.do(rank)
            elif (one == "begin") is not is_in_step:
                is_in_step = not is_in_step
                rank.begin() if is_in_step else rank.leave()
    assert ranks[0].memory == ranks[1].memory and ranks[0].board == ranks[1].board
    assert ranks[0].marks == ranks[1].marks and bool(ranks[0].marks) <= has_device
    assert [one.sequence for one in ranks[0].groups] == [one.sequence for one in ranks[1].groups]


@pytest.fixture(params=[False, True])
def rank(request: pytest.FixtureRequest) -> Rank:
    return Rank(at_length=request.param, compares=True)


def test_what_ends_after_its_record_is_gone_leaves_others_alone(rank: Rank) -> None:
    slow, quick = rank.groups
    slow.issue(Named(5))
    for _ in range(NUM_RECORDS):
        quick.issue(Named(6))
    slow.done()
    slow.failed()
    assert not any(record.is_done for record in read(rank.memory).records)


def test_a_graph_of_several_groups_is_over_in_all_of_them_with_the_newest(rank_with_device: Rank) -> None:
    first, second = rank_with_device.groups
    first.issue(Named(5))
    second.issue(Named(6))
    second.done()
    first.done()
    assert rank_with_device.marks == [("begun", 1), ("begun", 2), ("finished", 2)]


@pytest.fixture(params=[False, True])
def rank_with_device(request: pytest.FixtureRequest) -> Rank:
    return Rank(at_length=request.param, compares=False, has_device=True)
