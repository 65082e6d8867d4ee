"""A judge that is told by another node, whose clock differs by days, comes to the verdict of one that looks itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import pytest
from ledger_ranks import WritingRank, look_at

from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.journal_reader import read
from phalanx.ledger.judge import judge
from phalanx.ledger.look import Look, RankLook, Unheard
from phalanx.ledger.record import Kind
from phalanx.ledger.sighting import OFFSET_WINDOW_NS, FromNode, NodeView, Sighting, Telling
from phalanx.ledger.verdict import Verdict

DAY_NS = 24 * 3600 * 10**9
GROUPS: dict[str, Sequence[int]] = {"tp@0": (0, 1, 2)}
REDUCE, GATHER = "all_reduce float32 [3, 72]", "all_gather float32 [3, 130]"
GLANCE = 16


class OtherNode:
    """Ranks on a host whose clock is `ahead_ns` of the judge's, and what the judge knows of them."""

    def __init__(self, ranks: Sequence[WritingRank], ahead_ns: int) -> None:
        self.ranks = ranks
        self.view = NodeView()
        self.num_bytes = 0
        self._ahead_ns = ahead_ns
        self._telling = Telling()

    def tell(self, most: int = NUM_RECORDS, *, delay_ns: int = 0, now_ns: int | None = None) -> Sighting:
        """What the judge receives `delay_ns` later. `now_ns` is the judge's."""
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        looks = {rank.rank: self._there(rank, most) for rank in self.ranks}
        sighting = self._telling.sighting(now_ns + self._ahead_ns, looks, is_whole=most == NUM_RECORDS)
        encoded = msgspec.msgpack.encode(sighting)
        self.num_bytes += len(encoded)
        received = msgspec.msgpack.decode(encoded, type=FromNode)
        assert isinstance(received, Sighting)
        self.view.take(received, now_ns + delay_ns)
        return received

    def _there(self, rank: WritingRank, most: int) -> RankLook:
        """As a watcher there sees it: this process has only one clock."""
        look, ahead_ns = rank.look(), self._ahead_ns
        entries = read(rank.memory, most)
        records = tuple(
            one._replace(issued_ns=one.issued_ns + ahead_ns, done_ns=one.done_ns + ahead_ns if one.done_ns else 0)
            for one in entries.records
        )
        moved = msgspec.structs.replace(
            entries, records=records, phase_since_ns=entries.phase_since_ns and entries.phase_since_ns + ahead_ns
        )
        return msgspec.structs.replace(look, node="there", entries=moved)


def step(rank: WritingRank, number: int, *, until: int = 4) -> None:
    """Three sums and a gathering; the rank stays in the collective that comes after `until` others."""
    rank.begin(number)
    for i, what in enumerate([REDUCE, REDUCE, REDUCE, GATHER]):
        rank.issue("tp@0", what)
        if i == until:
            return
        rank.done("tp@0")
    rank.end()


def world() -> list[WritingRank]:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(3)]
    for rank in ranks:
        step(rank, 1)
    return ranks


def merged(here: Sequence[WritingRank], there: OtherNode, most: int = NUM_RECORDS) -> Look:
    own = look_at(here, GROUPS)
    return own._replace(now_ns=min(own.now_ns, there.view.seen_ns), ranks={**own.ranks, **there.view.looks(most)})


def verdict_on(here: Sequence[WritingRank], there: OtherNode, most: int = NUM_RECORDS) -> Verdict | None:
    return judge(merged(here, there, most))


@pytest.mark.parametrize("ahead_ns", [-3 * DAY_NS, 0, 5 * DAY_NS])
@pytest.mark.parametrize("culprit", [0, 2])
def test_the_verdict_is_that_of_one_host(culprit: int, ahead_ns: int) -> None:
    ranks = world()
    for rank in ranks:
        step(rank, 2, until=4 if rank.rank == culprit else 1)
    if culprit == 2:
        ranks[2].journal.leave_step()
    there = OtherNode(ranks[1:], ahead_ns)
    there.tell()
    alone, together = judge(look_at(ranks, GROUPS)), verdict_on(ranks[:1], there)
    assert alone is None and together is None, "one that is ahead keeps nobody waiting"
    for rank in ranks:
        if rank.rank != culprit:
            rank.done("tp@0")
            rank.collective("tp@0", REDUCE)
            rank.collective("tp@0", GATHER)
            rank.end()
            step(rank, 3, until=2)
    time.sleep(0.02)
    there.tell()
    alone, together = judge(look_at(ranks, GROUPS)), verdict_on(ranks[:1], there)
    assert alone is not None and together is not None
    assert together.culprits == alone.culprits == (culprit,)
    assert together.nodes == (("here",) if culprit == 0 else ("there",))
    assert (together.cause, together.step, together.sequence, together.peers) == (
        alone.cause,
        alone.step,
        alone.sequence,
        alone.peers,
    )
    assert together.waiting == alone.waiting
    assert abs(together.waited_s - alone.waited_s) < 0.02


@pytest.mark.parametrize("process", ["gone", "stopped"])
def test_what_becomes_of_a_process(process: str) -> None:
    ranks = world()
    there = OtherNode(ranks[1:], DAY_NS)
    for rank in ranks[:2]:
        step(rank, 2, until=1)
    there.tell()
    ranks[2].journal.enter("stepping")
    ranks[2].process = process  # type: ignore[assignment]
    there.tell()
    verdict = verdict_on(ranks[:1], there)
    assert verdict is not None and (verdict.cause, verdict.culprits, verdict.nodes) == (process, (2,), ("there",))


def test_nodes_that_are_not_heard_of() -> None:
    """Who waits for them is told, and nothing else is judged."""
    ranks = world()
    there = OtherNode(ranks[1:], DAY_NS)
    there.tell()
    step(ranks[0], 2, until=0)
    look = merged(ranks[:1], there)
    look = look._replace(
        unheard={"there": Unheard((1, 2), 3.04, "nothing has come from it"), "far": Unheard((5,), 2, "?")}
    )
    verdict = judge(look)
    assert verdict is not None and not verdict.is_ambiguous and not verdict.is_final
    assert (verdict.cause, verdict.culprits, verdict.nodes) == ("lost", (1, 2, 5), ("there", "there", "far"))
    assert str(verdict).startswith(
        "node there (rank 1, rank 2) and node far (rank 5) are gone or cannot be reached: nothing has come from it; ?; "
        "rank 0 waited for "
    )
    assert str(verdict).endswith(" s in all_reduce float32 [3, 72]")


def test_only_what_is_new_is_told() -> None:
    ranks = world()
    there = OtherNode(ranks[1:], DAY_NS)
    first = there.tell()
    assert {one.rank: len(one.entries.records) for one in first.ranks} == {1: 5, 2: 5}
    assert there.tell().ranks == (), "nothing has become of them"
    before = there.num_bytes
    there.tell()
    assert there.num_bytes - before < 40
    step(ranks[1], 2, until=1)
    (news,) = there.tell().ranks
    assert (news.rank, news.entries.texts) == (1, {}) and len(news.entries.records) == 3
    ranks[1].done("tp@0")
    (news,) = there.tell().ranks
    (record,) = news.entries.records
    assert record.is_done, "a record that has changed is told again"
    for rank in ranks[1:]:
        told, there_is = there.view.looks(NUM_RECORDS)[rank.rank].entries, read(rank.memory)
        assert [one.number for one in told.records] == [one.number for one in there_is.records]
        assert told.texts == there_is.texts


def test_how_long_a_rank_is_still_is_counted_on() -> None:
    """It is told when that begins, and not again as long as nothing else changes."""
    (rank,) = world()[1:2]
    telling, view, now_ns = Telling(), NodeView(), time.monotonic_ns()
    num_told = []
    for tenth, still_s in enumerate([0.0, 0.0, 0.1, 0.2, 0.3, 0.4]):
        look = msgspec.structs.replace(rank.look(), still_s=still_s)
        sighting = telling.sighting(now_ns + tenth * 10**8, {1: look}, is_whole=False)
        view.take(sighting, now_ns + tenth * 10**8)
        num_told.append(len(sighting.ranks))
        assert view.looks(GLANCE)[1].still_s == pytest.approx(still_s)
    assert num_told == [1, 0, 1, 0, 0, 0]


def test_a_glance_and_then_the_whole() -> None:
    """What was passed over, or was not over yet when it was told, is made up for."""
    ranks = world()
    there = OtherNode(ranks[1:], -DAY_NS)
    for number in range(2, 100):
        for rank in ranks:
            step(rank, number)
        if number % 10 == 0:
            there.tell(GLANCE)
    assert not there.view.is_whole
    assert len(there.view.looks(GLANCE)[1].entries.records) == GLANCE
    there.tell()
    assert there.view.is_whole
    told, there_is = there.view.looks(NUM_RECORDS)[1].entries.records, read(ranks[1].memory).records
    assert [(one.number, one.is_done) for one in told] == [(one.number, one.is_done) for one in there_is]


def test_no_more_is_kept_than_a_journal_has() -> None:
    ranks = world()
    there = OtherNode(ranks[1:], DAY_NS)
    for number in range(2, 2 + 2 * NUM_RECORDS // 5):
        step(ranks[1], number)
        there.tell(GLANCE)
    there.tell()
    records = there.view.looks(4 * NUM_RECORDS)[1].entries.records
    assert len(records) == NUM_RECORDS and records == tuple(sorted(records))
    assert len(there._telling._records[1]) == NUM_RECORDS


def test_a_message_that_is_late_makes_nobody_wait_longer() -> None:
    """The network holds up what the other node says: for as long nobody there can be said not to have come."""
    ranks = world()
    there = OtherNode(ranks[1:], 2 * DAY_NS)
    start_ns = time.monotonic_ns()
    there.tell(now_ns=start_ns)
    step(ranks[0], 2, until=1)
    now_ns = time.monotonic_ns()
    there.tell(now_ns=now_ns, delay_ns=3 * 10**9)
    look = merged(ranks[:1], there)._replace(now_ns=min(now_ns + 3 * 10**9, there.view.seen_ns))
    verdict = judge(look)
    assert verdict is None or verdict.waited_s < 0.1


def test_two_clocks_that_drift() -> None:
    """The least delay of the last minute or two counts, not that of the whole run."""
    ranks = world()
    there = OtherNode(ranks[1:], 0)
    start_ns = time.monotonic_ns()
    drift = 1e-4
    for second in range(0, 600, 10):
        at_ns = start_ns + second * 10**9
        there._ahead_ns = -int(drift * second * 1e9)
        there.tell(now_ns=at_ns, delay_ns=0 if second % 20 else 10**8)
    assert abs(there.view.seen_ns - at_ns) < 2 * drift * OFFSET_WINDOW_NS + 1e6


def test_records_keep_their_order_between_hosts_as_far_as_it_can_be_known() -> None:
    ranks = world()
    there = OtherNode(ranks[1:], 4 * DAY_NS)
    there.tell()
    steps = [
        next(record for record in one.entries.records if record.kind == Kind.STEP).issued_ns
        for _, one in sorted(merged(ranks[:1], there).ranks.items())
    ]
    assert steps == sorted(steps), "ranks have begun one after the other"
