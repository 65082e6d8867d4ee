"""What is tried after a fault: time is a number here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phalanx.membership.ladder import (
    MOST_FRUITLESS,
    MOST_FRUITLESS_ON_MEMORY,
    MOST_TRIES,
    STANDBY_S,
    Attempt,
    Climb,
    Ladder,
    Rung,
)

BUDGET_S = 100.0


def tried(climb: Climb, *, has_standby: bool = True, holds_memory: bool = True, may_reload: bool = True) -> list[Rung]:
    """The rungs, when each of them fails at once and a standby line is there for the first try only."""
    rungs: list[Rung] = []
    while (
        attempt := climb.next(
            0.0,
            has_standby=has_standby and "standby" not in rungs,
            holds_memory=holds_memory and "checkpoint" not in rungs,
            may_reload=may_reload,
        )
    ) is not None:
        rungs.append(attempt.rung)
        climb.failed(attempt.rung, "no luck")
    return rungs


def test_every_rung_has_its_turn() -> None:
    climb = Ladder(BUDGET_S).begin(0.0)
    assert tried(climb) == ["standby", "new line", "new line", "checkpoint", "checkpoint", "checkpoint"]
    assert climb.tried == "standby: no luck; " + "new line: no luck; " * 2 + "; ".join(["checkpoint: no luck"] * 3)


def test_without_a_standby_line_a_new_one_is_started() -> None:
    assert tried(Ladder(BUDGET_S).begin(0.0), has_standby=False)[0] == "new line"


def test_without_memory_everything_is_read_again() -> None:
    """Also with a standby line: what it has is that memory."""
    assert set(tried(Ladder(BUDGET_S).begin(0.0), holds_memory=False)) == {"checkpoint"}


def test_weights_that_are_lost_are_not_replaced_by_others() -> None:
    climb = Ladder(BUDGET_S).begin(0.0)
    assert tried(climb, may_reload=False) == ["standby", "new line", "new line"]
    assert "the checkpoint does not have them" in climb.tried
    assert tried(Ladder(BUDGET_S).begin(0.0), holds_memory=False, may_reload=False) == []


def test_a_rung_leaves_time_for_those_after_it() -> None:
    climb = Ladder(BUDGET_S).begin(50.0)
    state = {"holds_memory": True, "may_reload": True}
    assert climb.next(50.0, has_standby=True, **state) == Attempt("standby", STANDBY_S)
    assert climb.next(60.0, has_standby=False, **state) == Attempt("new line", 45.0)
    assert climb.next(105.0, has_standby=False, **state) == Attempt("new line", 22.5)
    assert climb.next(130.0, has_standby=False, **state) == Attempt("checkpoint", 20.0)
    assert climb.next(150.0, has_standby=False, **state) is None
    assert "100 s (heal_timeout_s) are over" in climb.tried


def test_memory_that_does_not_help_is_not_trusted_for_ever() -> None:
    ladder = Ladder(BUDGET_S)
    firsts = []
    for _ in range(MOST_FRUITLESS + 1):
        attempt = ladder.begin(0.0).next(0.0, has_standby=True, holds_memory=True, may_reload=True)
        firsts.append(attempt and attempt.rung)
    num_anew = MOST_FRUITLESS - MOST_FRUITLESS_ON_MEMORY
    assert firsts == ["standby"] * MOST_FRUITLESS_ON_MEMORY + ["checkpoint"] * num_anew + [None]


def test_progress_makes_up_for_what_was_before() -> None:
    ladder = Ladder(BUDGET_S)
    for _ in range(3 * MOST_FRUITLESS):
        assert ladder.begin(0.0).next(0.0, has_standby=True, holds_memory=True, may_reload=True) is not None
        ladder.progressed()


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.floats(0.0, 30.0)), min_size=20, max_size=40))
def test_it_ends_and_no_try_takes_longer_than_is_left(seen: list[tuple[bool, bool, bool, float]]) -> None:
    """Whatever is there at each try, and however long it takes."""
    climb, now_s, num = Ladder(BUDGET_S).begin(0.0), 0.0, 0
    for has_standby, holds_memory, may_reload, took_s in seen:
        attempt = climb.next(now_s, has_standby=has_standby, holds_memory=holds_memory, may_reload=may_reload)
        if attempt is None:
            return
        num += 1
        assert 0 < attempt.deadline_s <= BUDGET_S - now_s
        assert holds_memory or attempt.rung == "checkpoint"
        now_s += min(took_s, attempt.deadline_s)
    assert num <= sum(MOST_TRIES.values())
