"""Ranks of a program that is not ours, without steps or a plan: whoever does otherwise is named, and nobody else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from phalanx.collectives.torch_calls import Call
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.journal_reader import read
from phalanx.ledger.program import ENDED_STEP, ENDING, JOINING, WHOLE_PROGRAM, joining_digest, joining_text, step_of
from phalanx.ledger.program_verdict import CERTAIN_S, JOINING_S, Newcomer, ProgramLook, ProgramRank, judge_program
from phalanx.ledger.verdict import Verdict

REDUCE, GATHER, BROADCAST = Call("all_reduce", "cpu"), Call("all_gather", "cpu"), Call("broadcast", "cpu", root=0)
SEND = Call("send/recv", "cpu")
PATIENCE_S = 10.0
WORLD = "world"


class Rank:
    """A rank that writes a journal in plain memory and does nothing else."""

    def __init__(self, rank: int, lanes: Sequence[str]) -> None:
        self.rank = rank
        self.memory = memoryview(bytearray(JOURNAL_BYTES))
        self.journal = Journal(self.memory, epoch=1)
        self.journal.begin_step(WHOLE_PROGRAM, 0, 0)
        self.process: Literal["running", "stopped", "gone"] = "running"
        self.gone_s = 0.0
        self._lanes = list(lanes)
        self._sequences = dict.fromkeys(lanes, 0)

    def issue(self, call: Call, lane: str = WORLD) -> int:
        text = call.text((0, 1, 2, 3))
        digest = call.digest(text)
        self.journal.explain(digest, lambda: text)
        self._sequences[lane] += 1
        return self.journal.issue(1 + self._lanes.index(lane), self._sequences[lane], digest, 0)

    def give(self, call: Call, lane: str = WORLD) -> int:
        number = self.issue(call, lane)
        self.journal.done(number)
        return number

    def end(self, how: str = "") -> None:
        self.process = "gone"
        if how:
            self.journal.explain(ENDING, lambda: how)
        else:
            self.journal.begin_step(ENDED_STEP, 0, 0)
            self.journal.enter("leaving")

    def look(self) -> ProgramRank:
        return ProgramRank(
            rank=self.rank,
            node="here",
            lanes=dict(enumerate(self._lanes, start=1)),
            process=self.process,
            gone_s=self.gone_s,
            entries=read(self.memory),
        )


def ranks_of(size: int, lanes: Sequence[str] = (WORLD,)) -> list[Rank]:
    """Ranks that have met twice."""
    ranks = [Rank(rank, lanes) for rank in range(size)]
    for one in ranks:
        for _ in range(2):
            one.give(REDUCE)
    return ranks


def verdict_on(
    ranks: Sequence[Rank], later_s: float = 0.5, lanes: dict[str, tuple[int, ...]] | None = None
) -> Verdict | None:
    members = lanes or {WORLD: tuple(one.rank for one in ranks)}
    now_ns = time.monotonic_ns() + int(later_s * 1e9)
    return judge_program(ProgramLook(now_ns, {one.rank: one.look() for one in ranks}, members), PATIENCE_S)


def found(verdict: Verdict | None) -> tuple[str, tuple[int, ...]] | None:
    return None if verdict is None else (verdict.cause, verdict.culprits)


def test_all_is_well() -> None:
    ranks = ranks_of(3)
    assert verdict_on(ranks, later_s=3600) is None, "a pause of all"
    for one in ranks:
        one.issue(REDUCE)
    assert verdict_on(ranks, later_s=3600) is None, "all are in it: the data is on its way"
    ranks = ranks_of(3)
    for one in ranks[:2]:
        one.issue(REDUCE)
    assert verdict_on(ranks, later_s=PATIENCE_S - 1) is None, "one computes"
    ranks = ranks_of(3)
    for one in ranks:
        one.end()
    assert verdict_on(ranks, later_s=3600) is None, "the program has ended"


def test_a_source_that_goes_ahead_waits_for_nobody() -> None:
    ranks = ranks_of(2)
    ranks[0].give(BROADCAST)
    assert verdict_on(ranks, later_s=3600) is None
    ranks[0].give(REDUCE)
    assert found(verdict_on(ranks, later_s=3600)) == ("late", (1,))


@pytest.mark.parametrize("culprit", range(3))
def test_another_collective(culprit: int) -> None:
    ranks = ranks_of(3)
    for one in ranks:
        one.issue(GATHER if one.rank == culprit else REDUCE)
    verdict = verdict_on(ranks)
    assert found(verdict) == ("diverged", (culprit,)) and verdict is not None
    assert (verdict.sequence, verdict.group, verdict.theirs, verdict.peers) == (3, WORLD, "all_gather", "all_reduce")
    assert verdict.waiting == tuple(rank for rank in range(3) if rank != culprit)
    assert "step" not in str(verdict)


def test_a_true_tie_is_said_to_be_one() -> None:
    ranks = ranks_of(2)
    ranks[0].issue(GATHER)
    ranks[1].issue(REDUCE)
    assert found(verdict_on(ranks)) == ("diverged", (0, 1))


def test_who_is_still_to_come_decides_between_two() -> None:
    ranks = ranks_of(3)
    ranks[1].issue(GATHER)
    ranks[2].issue(REDUCE)
    assert verdict_on(ranks) is None
    assert found(verdict_on(ranks, later_s=PATIENCE_S + 1)) == ("diverged", (1, 2))
    ranks[0].issue(REDUCE)
    assert found(verdict_on(ranks)) == ("diverged", (1,))


def test_who_is_stopped_is_told_of_while_its_voice_is_missing() -> None:
    ranks = ranks_of(3)
    ranks[0].process = "stopped"
    ranks[1].issue(GATHER)
    ranks[2].issue(REDUCE)
    assert found(verdict_on(ranks, later_s=CERTAIN_S + 1)) == ("stopped", (0,))


@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize("given", [True, False])
def test_one_that_does_not_come(culprit: int, given: bool) -> None:
    """Whether its peers are in the call, or have left it to a GPU or to C++."""
    ranks = ranks_of(3)
    for one in ranks:
        if one.rank != culprit:
            one.give(REDUCE) if given else one.issue(REDUCE)
    verdict = verdict_on(ranks, later_s=PATIENCE_S + 1)
    assert found(verdict) == ("late", (culprit,)) and verdict is not None and not verdict.is_final


@pytest.mark.parametrize("how", ["", "has ended with ValueError: no"])
@pytest.mark.parametrize("culprit", range(3))
def test_one_that_has_ended_while_it_is_needed(culprit: int, how: str) -> None:
    """Its peers fail because of it, and end as well: they are not to blame."""
    ranks = ranks_of(3)
    for one in ranks:
        if one.rank == culprit:
            one.end(how)
        else:
            one.issue(REDUCE)
    cause = "gone" if how else "skipped"
    assert found(verdict_on(ranks)) == (cause, (culprit,))
    for one in ranks:
        if one.rank != culprit:
            one.end("has ended with RuntimeError: Connection closed by peer")
    verdict = verdict_on(ranks)
    assert found(verdict) == (cause, (culprit,)) and verdict is not None and verdict.what.startswith("has ended with")


@pytest.mark.parametrize("culprit", range(3))
@pytest.mark.parametrize("dies", [True, False])
def test_one_that_ends_of_what_it_had_differed_in_has_diverged(culprit: int, dies: bool) -> None:
    """Or its peer does; others go on, and wait for it."""
    ranks = ranks_of(3)
    ends = culprit if dies else (culprit + 1) % 3
    for one in ranks:
        one.give(GATHER if one.rank == culprit else REDUCE)
    ranks[ends].process = "gone"
    for one in ranks:
        if one.rank != ends:
            one.issue(REDUCE)
    verdict = verdict_on(ranks)
    assert found(verdict) == ("diverged", (culprit,)) and verdict is not None and verdict.sequence == 3


def test_who_differs_after_another_has_ended_is_not_the_first() -> None:
    """As in what it does when it has failed."""
    ranks = ranks_of(3)
    ranks[0].process = "gone"
    for one in ranks[1:]:
        one.issue(REDUCE)
    ranks[2].issue(GATHER)
    ranks[1].issue(REDUCE)
    assert found(verdict_on(ranks)) == ("gone", (0,))


def test_who_fails_because_of_another_is_not_the_first() -> None:
    """Rank 0 is killed, rank 1 fails as it waits for it, rank 2 waits for rank 1."""
    lanes = {"0 to 1": (0, 1), "1 to 2": (1, 2)}
    ranks = [Rank(rank, lanes) for rank in range(3)]
    ranks[1].issue(SEND, "0 to 1")
    ranks[2].issue(SEND, "1 to 2")
    ranks[0].process = "gone"
    ranks[1].end("has ended with RuntimeError")
    assert found(verdict_on(ranks, lanes=lanes)) == ("gone", (0,))


def test_one_that_is_killed_while_nobody_needs_it() -> None:
    ranks = ranks_of(2)
    ranks[1].process = "gone"
    assert verdict_on(ranks) is None, "perhaps all of them end now"
    ranks[1].gone_s = 1.5
    assert found(verdict_on(ranks)) == ("gone", (1,))
    ranks[0].process = "gone"
    assert verdict_on(ranks) is None


def test_one_that_is_stopped() -> None:
    ranks = ranks_of(2)
    ranks[1].process = "stopped"
    assert verdict_on(ranks, later_s=60) is None, "nobody needs it"
    ranks[0].issue(REDUCE)
    assert verdict_on(ranks) is None, "not yet"
    assert found(verdict_on(ranks, later_s=2)) == ("stopped", (1,))
    ranks[0].process = "stopped"
    assert verdict_on(ranks, later_s=5) is None, "the whole program is"


def test_whoever_waits_is_followed_to_one_that_waits_for_nobody() -> None:
    lanes = {WORLD: (0, 1, 2), "pair": (1, 2)}
    ranks = ranks_of(3, list(lanes))
    ranks[0].issue(REDUCE)
    ranks[1].issue(REDUCE, "pair")
    assert found(verdict_on(ranks, later_s=11, lanes=lanes)) == ("late", (2,))


def test_a_circle() -> None:
    lanes = {WORLD: (0, 1), "pair": (0, 1)}
    ranks = ranks_of(2, list(lanes))
    ranks[0].issue(REDUCE)
    ranks[1].issue(REDUCE, "pair")
    assert found(verdict_on(ranks, later_s=2, lanes=lanes)) == ("circle", (0, 1))


def test_waits_that_are_not_known_to_be_any_are_no_circle_at_once() -> None:
    lanes = {WORLD: (0, 1), "pair": (0, 1)}
    ranks = ranks_of(2, list(lanes))
    ranks[0].give(REDUCE)
    ranks[1].give(REDUCE, "pair")
    assert verdict_on(ranks, later_s=2, lanes=lanes) is None
    assert found(verdict_on(ranks, later_s=11, lanes=lanes)) == ("circle", (0, 1))


def test_a_wait_begins_when_somebody_waits() -> None:
    """What was received beforehand is no wait until the program comes to it."""
    lanes = {"1 to 0": (0, 1)}
    ranks = [Rank(rank, lanes) for rank in range(2)]
    number = ranks[0].give(SEND, "1 to 0")
    assert verdict_on(ranks, later_s=3600, lanes=lanes) is None
    ranks[0].journal.undone(number)
    assert found(verdict_on(ranks, later_s=11, lanes=lanes)) == ("late", (1,))


@pytest.mark.parametrize(("theirs", "cause"), [(4, "skipped"), (2, "behind"), (3, "late")])
def test_programs_that_tell_their_steps(theirs: int, cause: str) -> None:
    ranks = ranks_of(2)
    ranks[0].journal.begin_step(step_of(3), 0, 0)
    ranks[1].journal.begin_step(step_of(theirs), 0, 0)
    ranks[0].issue(REDUCE)
    verdict = verdict_on(ranks, later_s=11)
    assert found(verdict) == (cause, (1,)) and verdict is not None and verdict.step == 3
    assert (verdict_on(ranks, later_s=2) is None) == (cause != "skipped")


class JoiningRank(Rank):
    """A rank that has come to where ranks find each other."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, [JOINING])
        self.journal.explain(joining_digest(size), lambda: joining_text(size))
        self.number = self.journal.issue(1, 1, joining_digest(size), 0)

    def leave(self) -> None:
        self.journal.done(self.number)


def joining_verdict(
    ranks: Sequence[Rank],
    later_s: float,
    size: int = 3,
    newcomers: Sequence[Newcomer] = (),
    here: Sequence[int] = (),
) -> Verdict | None:
    look = ProgramLook(
        time.monotonic_ns() + int(later_s * 1e9),
        {one.rank: one.look() for one in ranks},
        {JOINING: tuple(range(size))},
        {one.rank: one for one in newcomers},
        frozenset(here),
    )
    return judge_program(look, PATIENCE_S)


@pytest.mark.parametrize(
    ("process", "cause", "after_s", "says"),
    [
        ("unknown", "late", JOINING_S, "does not come to init_process_group of 3 ranks: no process of it is known"),
        ("running", "late", JOINING_S, "does not come to init_process_group of 3 ranks: its process 4711 is there"),
        ("stopped", "stopped", CERTAIN_S, "is stopped by a signal, and has not come to init_process_group of 3 ranks"),
        ("gone", "gone", CERTAIN_S, "has ended and not come to init_process_group of 3 ranks"),
    ],
)
@pytest.mark.parametrize("culprit", range(3))
def test_a_rank_that_never_comes(culprit: int, process: Any, cause: str, after_s: float, says: str) -> None:
    ranks = [JoiningRank(rank, 3) for rank in range(3) if rank != culprit]
    newcomers = [Newcomer(rank=culprit, node="here", process=process, pid=4711)] if process != "unknown" else []
    assert joining_verdict(ranks, after_s - 0.5, newcomers=newcomers) is None
    verdict = joining_verdict(ranks, after_s + 0.5, newcomers=newcomers)
    assert found(verdict) == (cause, (culprit,)) and verdict is not None
    assert verdict.what == says and verdict.waiting == tuple(one.rank for one in ranks)
    assert (verdict.group, verdict.sequence, verdict.step) == (JOINING, 1, None)


def test_of_several_that_never_come_one_of_this_host_is_named_first() -> None:
    ranks = [JoiningRank(0, 4)]
    verdict = joining_verdict(ranks, JOINING_S + 1, size=4, here=(0, 3))
    assert found(verdict) == ("late", (3,)) and verdict is not None
    assert verdict.what.endswith("no process of it is known; nor do ranks 1, 2") and not verdict.is_ambiguous
    verdict = joining_verdict(ranks, JOINING_S + 1, size=2, here=(0,))
    assert verdict is not None and verdict.what.endswith("it is of another host")


def test_ranks_that_have_all_come_and_do_not_find_each_other() -> None:
    ranks = [JoiningRank(rank, 3) for rank in range(3)]
    assert joining_verdict(ranks, JOINING_S - 1) is None
    verdict = joining_verdict(ranks, JOINING_S + 1)
    assert found(verdict) == ("store", ()) and verdict is not None
    assert verdict.what.startswith("ranks 0, 1, 2 have all come to init_process_group of 3 ranks")
    ranks[0].leave()
    ranks[2].leave()
    assert found(joining_verdict(ranks, JOINING_S + 1)) == ("hung", (1,))
    ranks[1].leave()
    assert joining_verdict(ranks, 3600) is None


def test_a_rank_that_is_stopped_or_ends_while_ranks_find_each_other() -> None:
    ranks = [JoiningRank(rank, 3) for rank in range(3)]
    ranks[1].process = "stopped"
    assert joining_verdict(ranks, CERTAIN_S - 0.5) is None
    assert found(joining_verdict(ranks, CERTAIN_S + 0.5)) == ("stopped", (1,))
    ranks[1].end("has ended with ValueError: no such interface")
    ranks[1].gone_s = 1.5
    assert found(joining_verdict(ranks, CERTAIN_S + 0.5)) == ("gone", (1,))


def test_ranks_of_worlds_of_other_sizes() -> None:
    ranks = [JoiningRank(rank, 4 if rank == 2 else 3) for rank in range(3)]
    verdict = joining_verdict(ranks, 0.5)
    assert found(verdict) == ("diverged", (2,)) and verdict is not None
    assert (verdict.theirs, verdict.peers) == ("init_process_group of 4 ranks", "init_process_group of 3 ranks")


def test_who_makes_its_group_anew_is_waited_for_as_at_first() -> None:
    ranks = [JoiningRank(rank, 2) for rank in range(2)]
    for one in ranks:
        one.leave()
    ranks[0].journal.issue(1, 2, joining_digest(2), 0)
    assert joining_verdict(ranks, JOINING_S - 1, size=2) is None
    assert found(joining_verdict(ranks, JOINING_S + 1, size=2)) == ("late", (1,))


def test_a_rank_that_is_stopped_in_what_others_are_in() -> None:
    ranks = ranks_of(3)
    for one in ranks:
        one.issue(REDUCE)
    ranks[2].process = "stopped"
    assert verdict_on(ranks) is None
    assert found(verdict_on(ranks, later_s=2)) == ("stopped", (2,))
