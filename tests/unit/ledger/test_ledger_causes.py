"""What keeps a rank, told apart: and that healthy runs give no verdict, whatever a look catches them at."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_ranks import Clock, WritingRank, look_at

from phalanx.ledger.awaited import HUNG_S
from phalanx.ledger.journal_layout import PHASES
from phalanx.ledger.journal_reader import read
from phalanx.ledger.judge import STORE_S, judge
from phalanx.ledger.limits import BUDGETS_S, Limits
from phalanx.ledger.look import Look, Unheard, standings
from phalanx.ledger.verdict import Verdict

WORLD = (0, 1, 2)
GROUPS: dict[str, Sequence[int]] = {"tp@0": WORLD}
REDUCE, GATHER = "all_reduce float32 [3, 72]", "all_gather float32 [3, 130]"
NS = 10**9


def world() -> list[WritingRank]:
    """Ranks in a step, none in a collective."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in WORLD]
    for rank in ranks:
        rank.begin(1)
        rank.collective("tp@0", REDUCE)
    return ranks


def seen(ranks: Sequence[WritingRank], after_s: float = 0.0, **of_rank_1: float) -> Look:
    """`of_rank_1`: what /proc says of it."""
    looks = {rank.rank: rank.look(**of_rank_1 if rank.rank == 1 else {}) for rank in ranks}
    return Look(time.monotonic_ns() + int(after_s * NS), looks, GROUPS)


def judged(look: Look) -> Verdict:
    verdict = judge(look)
    assert verdict is not None
    return verdict


def waiting_for_1() -> list[WritingRank]:
    ranks = world()
    for rank in (ranks[0], ranks[2]):
        rank.issue("tp@0", REDUCE)
    return ranks


def test_a_rank_that_computes_is_slow() -> None:
    verdict = judged(seen(waiting_for_1(), still_s=2.0, cpu_s=1.9))
    assert (verdict.cause, verdict.culprits) == ("slow", (1,))
    assert "computes and does not come to all_reduce" in str(verdict) and "1.9 s of CPU in 2.0 s" in str(verdict)


def test_a_rank_that_computes_instead_of_beginning_a_step_is_slow() -> None:
    ranks = world()
    for rank in ranks:
        rank.end()
    for rank in (ranks[0], ranks[2]):
        rank.begin(2)
        rank.issue("tp@0", REDUCE)
    verdict = judged(seen(ranks, still_s=2.0, cpu_s=1.9))
    assert (verdict.cause, verdict.culprits) == ("slow", (1,))
    assert "has not begun step 2: it is idle, and computes: 1.9 s of CPU in 2.0 s" in str(verdict)
    assert judged(seen(ranks, still_s=2.0, cpu_s=0.1)).cause == "behind"


def test_a_rank_that_computes_as_far_as_it_has_a_core_is_slow() -> None:
    verdict = judged(seen(waiting_for_1(), still_s=4.0, cpu_s=0.9, starved_s=3.0))
    assert (verdict.cause, verdict.culprits) == ("slow", (1,))


def test_a_rank_that_sleeps_somewhere_is_late() -> None:
    verdict = judged(seen(waiting_for_1(), still_s=2.0, cpu_s=0.01, starved_s=1.9))
    assert (verdict.cause, verdict.culprits) == ("late", (1,))
    assert "has waited 1.9 s for a core" in str(verdict)


@pytest.mark.parametrize(("cpu_s", "cause"), [(0.01, "late"), (1.9, "slow")])
def test_a_rank_that_is_still_in_the_step_before(cpu_s: float, cause: str) -> None:
    """Its peers have left that without it: a root runs ahead of those that it sends to."""
    ranks = world()
    for rank in (ranks[0], ranks[2]):
        rank.end()
        rank.begin(2)
        rank.issue("tp@0", REDUCE)
    verdict = judged(seen(ranks, still_s=2.0, cpu_s=cpu_s))
    assert (verdict.cause, verdict.culprits, verdict.step, verdict.waiting) == (cause, (1,), 2, (0, 2))
    assert "does not come to all_reduce float32 [3, 72] in step 2" in str(verdict)
    ranks[1].end()
    assert judged(seen(ranks)).cause == "behind"


@pytest.mark.parametrize("num_ahead", [1, 2])
@pytest.mark.parametrize("num_collectives", [1, 40])
def test_a_rank_that_does_not_begin_a_step_that_nobody_needs_it_in(num_ahead: int, num_collectives: int) -> None:
    """As the last stage of a pipeline, whose peers have sent it what it needs and left."""
    clock = Clock()
    ranks = [WritingRank(rank, ["tp@0"], now_ns=clock) for rank in WORLD]
    for rank in ranks:
        rank.begin(7)
        rank.end()
    assert judge(look_at(ranks, GROUPS, clock)) is None
    for step in range(8, 8 + num_ahead):
        for rank in ranks[:2]:
            rank.begin(step)
            for _ in range(num_collectives):
                rank.collective("tp@0", REDUCE)
            rank.end()
    clock.pass_s(1.5)
    look = look_at(ranks, GROUPS, clock)
    glances = {rank.rank: msgspec.structs.replace(rank.look(), entries=read(rank.memory, 16)) for rank in ranks}
    for one in (look, look._replace(ranks=glances)):
        verdict = judged(one)
        assert (verdict.cause, verdict.culprits, verdict.step) == ("behind", (2,), 8)
        assert verdict.waited_s == pytest.approx(1.5) and verdict.is_of_a_wait
    ranks[2].begin(8)
    assert judged(look_at(ranks, GROUPS, clock)).cause == "late", "it has begun it, and is the only one inside"


@pytest.mark.parametrize("is_awaited", [True, False])
def test_a_gil_that_is_held(is_awaited: bool) -> None:
    verdict = judged(seen(waiting_for_1() if is_awaited else world(), still_s=1.0, cpu_s=1.0, held_s=0.7))
    assert (verdict.cause, verdict.culprits) == ("gil", (1,))
    assert str(verdict).startswith("rank 1 on here has held its GIL for 0.7 s in one call, while stepping")
    assert verdict.waiting == ((0, 2) if is_awaited else ())


@pytest.mark.parametrize("phase", ["loading", "calling a method"])
def test_a_gil_that_is_held_where_none_is_needed(phase: str) -> None:
    ranks = world()
    ranks[1].journal.enter(phase)
    assert judge(seen(ranks, held_s=5.0)) is None


def test_a_collective_has_its_time_from_when_the_last_has_come() -> None:
    clock = Clock()
    ranks = [WritingRank(rank, ["tp@0"], now_ns=clock) for rank in WORLD]
    for rank in ranks:
        rank.begin(1)
        rank.issue("tp@0", REDUCE)
        clock.pass_s(5.0)
    clock.pass_s(HUNG_S / 2 - 5.0)
    assert judge(look_at(ranks, GROUPS, clock)) is None, "others wait for ten seconds, all are there for half of one"
    clock.pass_s(HUNG_S)
    verdict = judged(look_at(ranks, GROUPS, clock))
    assert (verdict.cause, verdict.waited_s) == ("hung", pytest.approx(1.5 * HUNG_S))


def test_a_collective_that_all_have_come_to_and_that_does_not_end() -> None:
    ranks = world()
    for rank in ranks:
        rank.issue("tp@0", REDUCE)
    assert judge(seen(ranks)) is None
    verdict = judged(seen(ranks, after_s=3.0))
    assert (verdict.cause, verdict.culprits, verdict.sequence) == ("hung", (), 2)
    assert str(verdict).startswith("ranks 0, 1, 2 have all come to all_reduce")
    for rank in (ranks[0], ranks[2]):
        rank.done("tp@0")
    verdict = judged(seen(ranks, after_s=3.0))
    assert (verdict.cause, verdict.culprits) == ("hung", (1,)), "which does not come out of it"


@pytest.mark.parametrize("culprit", WORLD)
def test_another_plan_with_the_same_collectives(culprit: int) -> None:
    """It hangs nobody, and is seen long after its records have been overwritten."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in WORLD]
    for rank in ranks:
        rank.begin(1, plan="another" if rank.rank == culprit else "plan")
        for _ in range(1200):
            rank.collective("tp@0", REDUCE)
        rank.end()
        rank.begin(2)
    verdict = judged(seen(ranks))
    assert (verdict.cause, verdict.culprits, verdict.step) == ("diverged", (culprit,), 1)
    assert f"rank {culprit} on here follows another plan in step 1 than its peers" == str(verdict)


@pytest.mark.parametrize("culprit", WORLD)
def test_another_collective_that_is_long_past(culprit: int) -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in WORLD]
    for rank in ranks:
        rank.begin(1)
        rank.collective("tp@0", GATHER if rank.rank == culprit else REDUCE)
        for _ in range(1200):
            rank.collective("tp@0", REDUCE)
    verdict = judged(seen(ranks))
    assert (verdict.cause, verdict.culprits) == ("diverged", (culprit,))
    assert "has issued something else than its peers, before all_reduce" in str(verdict)


def test_what_a_method_does_diverges_from_nothing() -> None:
    ranks = world()
    for rank in ranks:
        rank.end()
        rank.journal.leave_step()
        rank.collective("tp@0", GATHER if rank.rank == 1 else REDUCE)
        rank.begin(2)
        rank.collective("tp@0", REDUCE)
    assert judge(seen(ranks)) is None


@pytest.mark.parametrize("phase", sorted(BUDGETS_S))
def test_a_phase_that_takes_longer_than_its_budget(phase: str) -> None:
    ranks = world()
    ranks[1].journal.enter(phase)
    budget_s = Limits().budget_s(phase)
    assert budget_s is not None and phase in PHASES
    assert judge(seen(ranks[1:2], after_s=budget_s - 1)) is None
    verdict = judged(seen(ranks[1:2], after_s=budget_s + 1))
    assert (verdict.cause, verdict.culprits) == ("overdue", (1,))
    assert verdict.what.startswith(f"has been {phase} for {budget_s + 1:.0f} s")


def test_a_budget_is_less_than_the_deadline_of_the_run() -> None:
    limits = Limits(start_timeout_s=10.0, step_timeout_s=4.0)
    assert limits.budget_s("loading") == 8.0 and limits.budget_s("stepping") == 2.0
    assert limits.budget_s("idle") is None and limits.budget_s("calling a method") is None


def test_who_is_idle_is_idle_for_ever() -> None:
    ranks = world()
    for rank in ranks:
        rank.end()
    assert judge(seen(ranks, after_s=1e6)) is None


def test_who_waits_for_a_loading_rank_is_not_overdue_itself() -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in (0, 1)]
    ranks[1].journal.enter("starting")
    ranks[0].journal.enter("joining")
    with ranks[0].journal.joining(1):
        look = Look(time.monotonic_ns() + 200 * NS, {rank.rank: rank.look() for rank in ranks}, {"tp@0": (0, 1)})
        assert judge(look) is None, "joining takes 120 s at most, starting 300"
        assert standings(look)[0].waits_for == (1,)
        verdict = judged(look._replace(now_ns=look.now_ns + 200 * NS))
        assert (verdict.cause, verdict.culprits, verdict.waiting) == ("overdue", (1,), (0,))


def test_a_store_that_does_not_answer() -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in WORLD]
    for rank in ranks:
        rank.journal.enter("joining")
    with ranks[0].journal.awaiting("the store"), ranks[2].journal.awaiting("the store"):
        assert judge(seen(ranks, after_s=STORE_S + 1)) is None, "rank 1 has yet to write something"
        with ranks[1].journal.awaiting("the store"):
            assert judge(seen(ranks, after_s=STORE_S - 1)) is None
            verdict = judged(seen(ranks, after_s=STORE_S + 1))
            assert (verdict.cause, verdict.culprits) == ("store", ())
            assert "the store by which ranks find each other does not answer: ranks 0, 1, 2" in str(verdict)
            assert judge(seen(ranks[:2], after_s=STORE_S + 1)) is None, "rank 2 has not begun"
    assert judge(seen(ranks, after_s=STORE_S + 1)) is None


def test_a_group_that_all_have_come_to_join() -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in WORLD]
    with ExitStack() as stack:
        for rank in ranks:
            rank.journal.enter("joining")
            stack.enter_context(rank.journal.joining(1))
        assert judge(seen(ranks, after_s=BUDGETS_S["joining"] - 1)) is None
        verdict = judged(seen(ranks, after_s=BUDGETS_S["joining"] + 1))
    assert (verdict.cause, verdict.culprits) == ("store", ())
    assert str(verdict).startswith("ranks 0, 1, 2 have all come to join group tp@0, which does not end: to blame is no")


def test_ranks_of_a_node_without_a_watcher_are_not_judged_and_may_be_what_others_wait_for() -> None:
    ranks = waiting_for_1()
    look = seen(ranks, after_s=2.0)
    known = {rank: one for rank, one in look.ranks.items() if rank != 1}
    look = look._replace(ranks=known, unwatched={"there": Unheard((1,), 9.0, "it has no watcher")})
    verdict = judged(look)
    assert (verdict.cause, verdict.culprits, verdict.nodes, verdict.waiting) == ("lost", (1,), ("there",), (0, 2))
    assert verdict.is_of_a_wait and not verdict.is_ambiguous and not verdict.is_final
    assert str(verdict).startswith(
        "node there (rank 1) is not watched, and may be what others wait for: it has no watcher; ranks 0, 2 waited "
    )
    assert judge(look._replace(now_ns=look.now_ns - 2 * NS)) is None, "nobody has waited for long"


def test_a_node_that_is_not_heard_of() -> None:
    look = seen(waiting_for_1(), still_s=3.0)
    verdict = judged(look._replace(unheard={"here": Unheard(WORLD, 3.0, "nothing has come")}))
    assert (verdict.cause, verdict.culprits, verdict.is_final) == ("lost", WORLD, False)
    assert judged(look).cause == "late"


def test_who_has_left_is_not_blamed() -> None:
    ranks = waiting_for_1()
    ranks[1].process = "ended"
    assert judge(seen(ranks, after_s=1000.0)) is None


def test_the_tree_of_causes() -> None:
    """0 waits for 1 in one group, 1 for 2 in another, and 2 computes."""
    groups: dict[str, Sequence[int]] = {"tp@0": (0, 1), "pp@0": (1, 2)}
    ranks = [WritingRank(0, ["tp@0"]), WritingRank(1, ["tp@0", "pp@0"]), WritingRank(2, ["pp@0"])]
    for rank in ranks:
        rank.begin(1)
    ranks[0].issue("tp@0", REDUCE)
    ranks[1].issue("pp@0", GATHER)
    look = look_at(ranks, groups)
    of_rank = standings(look)
    assert [of_rank[rank].state for rank in range(3)] == ["waiting", "waiting", "computing"]
    assert [of_rank[rank].waits_for for rank in range(3)] == [(1,), (2,), ()]
    verdict = judged(look)
    assert (verdict.culprits, verdict.waiting) == ((2,), (0, 1))


PROGRAM = [("tp@0", REDUCE), ("tp@1", REDUCE), ("ep@0", GATHER), ("tp@0", GATHER), ("tp@1", GATHER), ("ep@0", REDUCE)]
GRID: dict[str, Sequence[int]] = {"tp@0": (0, 1), "tp@1": (2, 3), "ep@0": (0, 1, 2, 3)}
SLOWEST_TURN_S = 0.1  # so that no step takes longer than its budget


def life(rank: WritingRank, ranks: Sequence[WritingRank]) -> Iterator[str]:
    """Of a healthy rank; a pause after all that others could see, with the group that it has just come to, if any."""
    for step in count(1):
        rank.begin(step)
        yield ""
        for group, what in PROGRAM:
            if rank.rank not in GRID[group]:
                continue
            rank.issue(group, what)
            yield group
            while any(ranks[other].sequence(group) < rank.sequence(group) for other in GRID[group]):
                yield ""
            rank.done(group)
            yield ""
        rank.end()
        yield ""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, SLOWEST_TURN_S)), min_size=20, max_size=200))
def test_a_healthy_run_is_given_no_verdict(turns: list[tuple[int, float]]) -> None:
    """Ranks move one at a time, in any order that collectives allow. One may be seen to be awaited, and no more; and a
    collective to take its time, for as long as all have been in it."""
    clock = Clock()
    names = {rank: [group for group, members in GRID.items() if rank in members] for rank in range(4)}
    ranks = [WritingRank(rank, groups, now_ns=clock) for rank, groups in names.items()]
    lives = [life(rank, ranks) for rank in ranks]
    came_ns: dict[tuple[str | None, int | None], int] = {}
    for turn, took_s in turns:
        clock.pass_s(took_s)
        if group := next(lives[turn]):
            came_ns[group, ranks[turn].sequence(group)] = clock.ns  # in the end, of who came last
        verdict = judge(look_at(ranks, GRID, clock))
        if verdict is not None and verdict.cause == "hung":
            assert clock.ns - came_ns[verdict.group, verdict.sequence] >= HUNG_S * NS, verdict
        else:
            assert verdict is None or verdict.cause in ("late", "behind"), verdict
