"""What a rank has issued, what its device has come to and what that is through with are told apart."""

from __future__ import annotations

import msgspec
import pytest
from ledger_ranks import Named, WritingRank, look_at

from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal, Mark
from phalanx.ledger.journal_layout import BEGUN_WORD, FINISHED_WORD, JOURNAL_BYTES, NUM_RECORDS
from phalanx.ledger.journal_reader import read
from phalanx.ledger.judge import judge
from phalanx.ledger.sighting import NodeView, Telling
from phalanx.ledger.verdict import Verdict

REDUCE, GATHER = "all_reduce bfloat16 [3, 72]", "all_gather bfloat16 [3, 130]"
GROUPS = {"tp@0": (0, 1, 2), "ep@0": (0, 1, 2)}


class Stream:
    """A device that comes to what it was given when it is told to."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("Q")
        self._waiting: list[tuple[int, int]] = []

    @property
    def marks(self) -> tuple[Mark, Mark]:
        """For `Journal.follow_device`."""
        return self._write_to(BEGUN_WORD), self._write_to(FINISHED_WORD)

    def _write_to(self, word: int) -> Mark:
        return lambda number: self._waiting.append((word, number))

    def go_on(self, num_writes: int | None = None) -> None:
        """Each collective has one write when it is begun and one at its end."""
        for word, number in self._waiting[:num_writes]:
            self._words[word] = number
        del self._waiting[:num_writes]


def rank_on_device(rank: int) -> tuple[WritingRank, Stream]:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    stream = Stream(memory)
    return WritingRank(rank, list(GROUPS), memory, marks=stream.marks), stream


def world() -> tuple[list[WritingRank], list[Stream]]:
    """Ranks that have given their devices a step of three collectives."""
    ranks, streams = zip(*map(rank_on_device, range(3)), strict=True)
    for rank in ranks:
        rank.begin(1)
        rank.collective("tp@0", REDUCE)
        rank.collective("ep@0", GATHER)
        rank.collective("tp@0", REDUCE)
    return list(ranks), list(streams)


def verdict_on(ranks: list[WritingRank]) -> Verdict | None:
    return judge(look_at(ranks, GROUPS))


def test_states_of_a_collective() -> None:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    journal, stream = Journal(memory, epoch=1), Stream(memory)
    journal.follow_device(*stream.marks)
    group = group_notes(1, journal, None)
    seen = []

    def look() -> None:
        entries = read(memory)
        seen.append((entries.state(entries.records[0]), entries.records[0].is_done))

    group.issue(Named(5, REDUCE))
    look()
    group.done()
    look()
    for _ in range(2):
        stream.go_on(1)
        look()
    assert seen == [("issued", False), ("launched", False), ("running", False), ("done", True)]


def test_a_call_that_fails_gives_the_device_nothing_more() -> None:
    """It may be the device that fails; and then the collective was not launched."""
    rank, stream = rank_on_device(0)
    rank.collective("tp@0", REDUCE)
    stream.go_on()
    rank.issue("tp@0", GATHER)
    rank.fail("tp@0")
    entries = rank.look().entries
    assert entries.state(entries.records[-1]) == "issued"
    stream.go_on()
    assert rank.look().awaits is not None, "in which it has failed"
    rank.collective("tp@0", REDUCE)
    stream.go_on()
    assert rank.look().awaits is None, "its caller has gone on"


def test_a_step_is_done_when_it_is_answered_and_not_by_the_device() -> None:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    journal, stream = Journal(memory, epoch=1), Stream(memory)
    journal.follow_device(*stream.marks)
    journal.done(journal.begin_step(1, 9, 1))
    assert read(memory).records[0].is_done


def test_without_a_device_a_call_that_returned_is_done() -> None:
    rank = WritingRank(0, ["tp@0"])
    rank.issue("tp@0", REDUCE)
    before = rank.look().entries
    rank.done("tp@0")
    after = rank.look().entries
    assert [entries.state(entries.records[0]) for entries in (before, after)] == ["issued", "done"]


@pytest.mark.parametrize("most", [1, 16])
def test_a_glance_reaches_back_to_what_the_device_is_in(most: int) -> None:
    rank, stream = rank_on_device(0)
    for _ in range(100):
        rank.collective("tp@0", REDUCE)
    stream.go_on(2 * 30 + 1)  # in the 31st
    entries = read(rank.memory, most)
    is_open = [record for record in entries.records if not record.is_done]
    assert (is_open[0].sequence, entries.state(is_open[0]), len(is_open)) == (31, "running", 70)
    stream.go_on()
    assert len(read(rank.memory, most).records) == most


def test_the_judge_of_another_node_sees_what_a_device_is_in_and_that_it_is_through() -> None:
    rank, stream = rank_on_device(0)
    telling, view = Telling(), NodeView()
    for _ in range(40):
        rank.collective("tp@0", REDUCE)
    stream.go_on(2 * 5 + 1)
    view.take(telling.sighting(1, {0: rank.look()}, is_whole=True), 1)
    awaits = view.looks(16)[0].awaits
    assert awaits is not None and awaits[1].sequence == 6
    stream.go_on()
    glance = msgspec.structs.replace(rank.look(), entries=read(rank.memory, 16))
    view.take(telling.sighting(2, {0: glance}, is_whole=False), 2)
    assert view.looks(16)[0].awaits is None and view.looks(NUM_RECORDS)[0].awaits is None


def test_a_device_far_behind_costs_a_look_no_more_than_the_journal() -> None:
    rank, _ = rank_on_device(0)
    for _ in range(3 * NUM_RECORDS):
        rank.collective("tp@0", REDUCE)
    assert len(read(rank.memory, 16).records) == NUM_RECORDS


def test_ranks_whose_devices_are_all_there_wait_for_nobody() -> None:
    ranks, streams = world()
    for stream in streams:
        stream.go_on(3)
    assert verdict_on(ranks) is None
    assert [rank.look().awaits[0] for rank in ranks] == ["ep@0"] * 3  # type: ignore[index]


def test_a_device_that_computes_awaits_nobody() -> None:
    ranks, _ = world()
    assert all(rank.look().awaits is None for rank in ranks)
    assert verdict_on(ranks) is None


@pytest.mark.parametrize("culprit", range(3))
def test_the_rank_whose_device_does_not_come_though_all_have_issued(culprit: int) -> None:
    ranks, streams = world()
    for rank, stream in enumerate(streams):
        stream.go_on(2 if rank == culprit else 3)  # through with the first; the others are in the second
    verdict = verdict_on(ranks)
    assert verdict is not None and verdict.cause == "late" and verdict.culprits == (culprit,)
    assert (verdict.group, verdict.sequence, verdict.peers) == ("ep@0", 1, GATHER)
    assert verdict.waiting == tuple(rank for rank in range(3) if rank != culprit)
    assert "its GPU does not come to it" in verdict.what and REDUCE in verdict.what
    assert not verdict.is_hopeless


@pytest.mark.parametrize("culprit", range(3))
def test_the_rank_that_has_not_issued_what_the_devices_of_others_are_in(culprit: int) -> None:
    ranks, streams = world()
    for rank, stream in zip(ranks, streams, strict=True):
        stream.go_on()
        if rank.rank != culprit:
            rank.collective("tp@0", GATHER)
            rank.collective("ep@0", GATHER)
            stream.go_on(1)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (culprit,))
    assert (verdict.group, verdict.sequence) == ("tp@0", 3)


def test_a_device_that_waits_in_another_group_is_not_to_blame() -> None:
    """Rank 0 is in tp, to which rank 2 does not come as it is in ep, to which the device of rank 1 does not come."""
    groups = {"tp@0": (0, 2), "ep@0": (1, 2)}
    ranks = []
    for rank, given in enumerate([["tp@0"], ["ep@0"], ["ep@0", "tp@0"]]):
        one, stream = rank_on_device(rank)
        one.begin(1)
        for group in given:
            one.collective(group, REDUCE if group == "tp@0" else GATHER)
        stream.go_on(0 if rank == 1 else 1)
        ranks.append(one)
    verdict = judge(look_at(ranks, groups))
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (1,))
    assert (verdict.group, verdict.waiting) == ("ep@0", (0, 2)) and "what comes before" in verdict.what


def test_a_replay_of_another_graph_is_a_divergence() -> None:
    ranks, _ = world()
    for rank in ranks:
        rank.collective("tp@0", f"graph {8 if rank.rank == 1 else 16}")
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits, verdict.sequence) == ("diverged", (1,), 3)


def test_a_graph_of_two_groups_is_over_in_both() -> None:
    """Its collectives end in the opposite order of their beginning, as contexts do."""
    ranks, streams = world()
    for rank, stream in zip(ranks, streams, strict=True):
        rank.end()
        rank.begin(2)
        rank.issue("tp@0", "a graph")
        rank.issue("ep@0", "a graph")
        rank.done("ep@0")
        rank.done("tp@0")
        rank.end()
        stream.go_on()
    assert all(rank.look().awaits is None for rank in ranks)
    assert verdict_on(ranks) is None
