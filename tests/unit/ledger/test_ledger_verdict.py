"""Whatever one rank does otherwise than its peers, the verdict names it, rank 0 as well as any other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from ledger_ranks import WritingRank, look_at

from phalanx.ledger.judge import judge
from phalanx.ledger.verdict import Verdict

WORLD = {"tp@0": (0, 1, 2, 3)}
REDUCE, GATHER = "all_reduce float32 [3, 72]", "all_gather float32 [3, 130]"


def world(size: int = 4) -> list[WritingRank]:
    """Ranks that have been through a step."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(size)]
    for rank in ranks:
        step(rank, 1)
    return ranks


def step(rank: WritingRank, number: int, *, plan: str = "plan", until: int = 3) -> None:
    """A step of three sums and a gathering; at `until` the rank stays in that collective."""
    rank.begin(number, plan)
    for i, what in enumerate([REDUCE, REDUCE, REDUCE, GATHER]):
        rank.issue("tp@0", what)
        if i == until and until < 3:
            return
        rank.done("tp@0")
    rank.end()


def verdict_on(ranks: Sequence[WritingRank]) -> Verdict | None:
    return judge(look_at(ranks, {"tp@0": tuple(rank.rank for rank in ranks)}))


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_wrong(size: int) -> None:
    ranks = world(size)
    assert verdict_on(ranks) is None
    for rank in ranks:
        step(rank, 2, until=1)
    assert verdict_on(ranks) is None, "all have come to the collective"


def test_a_rank_that_is_far_ahead_is_no_divergence() -> None:
    ranks = world()
    for number in range(2, 400):
        step(ranks[0], number)
    assert verdict_on(ranks) is None


@pytest.mark.parametrize("culprit", range(4))
@pytest.mark.parametrize("process", ["gone", "stopped"])
def test_a_process_that_is_not_there(culprit: int, process: str) -> None:
    ranks = world()
    for rank in ranks:
        step(rank, 2, until=1 if rank.rank != culprit else 0)
    ranks[culprit].process = process  # type: ignore[assignment]
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == (process, (culprit,))
    assert str(verdict).startswith(f"rank {culprit} on here ")
    assert set(verdict.waiting) == set(range(4)) - {culprit}


def test_a_stopped_rank_that_nobody_needs_yet() -> None:
    ranks = world()
    ranks[1].process = ranks[3].process = "stopped"
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("stopped", (1,))
    assert str(verdict) == "rank 1 on here is stopped by a signal, while idle, and so is rank 3"


@pytest.mark.parametrize("culprit", range(4))
def test_another_collective(culprit: int) -> None:
    ranks = world()
    for rank in ranks:
        rank.begin(2)
        rank.collective("tp@0", REDUCE)
        rank.issue("tp@0", GATHER if rank.rank == culprit else REDUCE)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,))
    assert (verdict.step, verdict.group, verdict.sequence) == (2, "tp@0", 6)
    assert (verdict.theirs, verdict.peers) == (GATHER, REDUCE)


@pytest.mark.parametrize("culprit", range(4))
def test_a_collective_left_out_where_the_next_one_is_another(culprit: int) -> None:
    ranks = world()
    for rank in ranks:
        rank.begin(2)
        for _ in range(3 - (rank.rank == culprit)):
            rank.collective("tp@0", REDUCE)
        rank.issue("tp@0", GATHER)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,))
    assert verdict.sequence == 7


@pytest.mark.parametrize("culprit", range(4))
def test_a_step_left_early(culprit: int) -> None:
    """Seed 001's fault: no tokens for its experts, and the rank returns before the collective."""
    ranks = world()
    for rank in ranks:
        if rank.rank == culprit:
            rank.begin(2)
            rank.collective("tp@0", REDUCE)
            rank.end()
        else:
            step(rank, 2, until=1)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("skipped", (culprit,))
    assert len(verdict.waiting) == 3 and verdict.peers == REDUCE and (verdict.step, verdict.sequence) == (2, 6)


@pytest.mark.parametrize("culprit", range(2))
def test_of_two_ranks_the_plan_tells(culprit: int) -> None:
    """A third one, in no common group, has the same plan as the innocent."""
    ranks = [*world(2), WritingRank(2, [])]
    for rank in ranks:
        rank.begin(2, plan="another" if rank.rank == culprit else "plan")
    for rank in ranks[:2]:
        rank.issue("tp@0", GATHER if rank.rank == culprit else REDUCE)
    verdict = judge(look_at(ranks, {"tp@0": (0, 1)}))
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("diverged", (culprit,))


def test_a_true_tie_is_said_to_be_one() -> None:
    ranks = world(2)
    for rank in ranks:
        rank.begin(2)
        rank.issue("tp@0", GATHER if rank.rank == 0 else "barrier")  # neither has ever done that here
    verdict = verdict_on(ranks)
    assert verdict is not None and verdict.is_ambiguous and verdict.culprits == (0, 1)
    assert "which of them is wrong cannot be told" in str(verdict)


@pytest.mark.parametrize("culprit", range(4))
def test_a_rank_that_computes_for_ever(culprit: int) -> None:
    ranks = world()
    for rank in ranks:
        if rank.rank == culprit:
            rank.begin(2)
        else:
            step(rank, 2, until=0)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("late", (culprit,))
    assert "does not come to" in str(verdict) and len(verdict.waiting) == 3


@pytest.mark.parametrize("culprit", range(4))
def test_a_rank_that_has_not_begun_the_step(culprit: int) -> None:
    ranks = world()
    for rank in ranks:
        if rank.rank != culprit:
            step(rank, 2, until=0)
    verdict = verdict_on(ranks)
    assert verdict is not None and (verdict.cause, verdict.culprits) == ("behind", (culprit,))
    assert "has not begun step 2: it is idle" in str(verdict)


def test_who_is_waited_for_in_the_end() -> None:
    """Rank 0 waits for 1 in one group, 1 for 3 in another, and 3 for nobody."""
    groups: dict[str, Sequence[int]] = {"tp@0": (0, 1), "dp@1": (1, 3), "tp@1": (2, 3)}
    names = {0: ["tp@0"], 1: ["tp@0", "dp@1"], 2: ["tp@1"], 3: ["tp@1", "dp@1"]}
    ranks = [WritingRank(rank, of_rank) for rank, of_rank in names.items()]
    for rank in ranks:
        rank.begin(1)
    ranks[0].issue("tp@0", REDUCE)
    ranks[1].issue("dp@1", GATHER)
    verdict = judge(look_at(ranks, groups))
    assert verdict is not None and (verdict.cause, verdict.culprits, verdict.group) == ("late", (3,), "dp@1")


def test_a_group_whose_records_are_long_gone() -> None:
    """The peer has done its part of the rare collective, and thousands of others since."""
    groups: dict[str, Sequence[int]] = {"rare": (0, 1), "often": (1, 2)}
    ranks = [WritingRank(0, ["rare"]), WritingRank(1, ["rare", "often"]), WritingRank(2, ["often"])]
    ranks[1].collective("rare", REDUCE)
    for _ in range(3000):
        ranks[1].collective("often", GATHER)
    ranks[0].issue("rare", REDUCE)
    assert judge(look_at(ranks, groups)) is None


def test_a_circle_is_called_one() -> None:
    groups: dict[str, Sequence[int]] = {"a": (0, 1), "b": (0, 1)}
    ranks = [WritingRank(rank, ["a", "b"]) for rank in range(2)]
    for rank in ranks:
        rank.begin(1)
    ranks[0].issue("a", REDUCE)
    ranks[1].issue("b", REDUCE)
    verdict = judge(look_at(ranks, groups))
    assert verdict is not None and verdict.cause == "circle" and verdict.culprits == (0, 1)
    assert "rank 0 in all_reduce" in str(verdict) and "of a" in str(verdict)


def test_of_several_divergences_the_earliest_counts() -> None:
    groups: dict[str, Sequence[int]] = {"tp@0": (0, 1, 2), "ep@0": (0, 1, 2)}
    ranks = [WritingRank(rank, list(groups)) for rank in range(3)]
    for rank in ranks:
        rank.begin(1)
        rank.collective("ep@0", REDUCE if rank.rank != 2 else GATHER)
        rank.issue("tp@0", REDUCE if rank.rank != 0 else GATHER)
    verdict = judge(look_at(ranks, groups))
    assert verdict is not None and (verdict.culprits, verdict.group) == ((2,), "ep@0")
