"""The states of a resize: what commits it, what undoes it, and that nothing else happens, in any order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phalanx.engine.roster import Empty, End, Keep, Order, Outcome, Replace, Roster, Start
from phalanx.errors import RequestError, ResizeUnderWayError


def roster(size: int, *, replaces_dead: bool = True) -> Roster:
    return Roster(size, replaces_dead=replaces_dead)


def undone(before: int, asked: int, reason: str, ending: str = "failed") -> Outcome:
    return Outcome(ending=ending, reason=reason, size_before=before, size_asked_for=asked)  # type: ignore[arg-type]


def done(before: int, asked: int) -> Outcome:
    return Outcome(ending="done", size_before=before, size_asked_for=asked)


def test_up_nobody_serves_before_all_are_ready() -> None:
    found = roster(1)
    assert found.begin(3, (), {}) == [Start(1), Start(2)]
    assert found.ready(2) == []
    assert found.serving() == [0]
    assert found.ready(1) == []
    assert found.serving() == [0, 1, 2]
    assert (found.resize, found.last) == (None, done(1, 3))


def test_down_all_leave_together_and_it_is_over_when_they_are_gone() -> None:
    found = roster(3)
    assert found.begin(1, (0,), {0: 9, 1: 5, 2: 4}) == [Empty(0), Empty(2)]
    assert found.serving() == [1]
    assert found.emptied(2) == []
    assert found.emptied(0) == [End(0), End(2)]
    assert found.cancel("too late") == []
    found.ended(0)
    assert found.resize is not None
    found.ended(2)
    assert (dict(found.phases), found.last) == ({1: "serving"}, done(3, 1))
    assert found.begin(2, (), {}) == [Start(0)], "the lowest number that is free"


def test_who_leaves_is_dead_or_named_or_has_the_fewest_requests() -> None:
    assert roster(3).begin(2, (), {0: 1, 1: 1, 2: 5}) == [Empty(1)]
    assert roster(3).begin(2, (), {}) == [Empty(2)]
    assert roster(3).begin(1, (1, 1), {0: 2, 1: 9, 2: 1}) == [Empty(1), Empty(2)]
    found = roster(3)
    assert found.died(0, "it was killed") == [Replace(0)]
    assert found.begin(2, (), {0: 0, 1: 0, 2: 0}) == [Empty(0)]
    assert found.emptied(0) == [End(0)]


def test_one_that_is_being_started_again_leaves_before_those_that_serve() -> None:
    assert roster(3).begin(2, (), {0: 3, 1: 0, 2: 0}, down=[0]) == [Empty(0)]
    found = roster(3)
    found.died(1, "killed")
    assert found.begin(2, (), {0: 0, 1: 9, 2: 0}, down=[0]) == [Empty(1)]
    with pytest.raises(RequestError, match="at least one must serve"):
        roster(2).begin(1, [1], {}, down=[0])
    assert roster(2).begin(1, [0], {}, down=[0]) == [Empty(0)]


def test_a_death_counts_once() -> None:
    found = roster(3)
    assert found.counts_on(1)
    found.begin(1, (1, 2), {})
    found.died(1, "killed")
    assert (found.counts_on(1), found.counts_on(2), found.counts_on(7)) == (False, True, False)
    found.died(0, "killed")
    assert not found.counts_on(0)


@pytest.mark.parametrize("what", ["failed", "died"])
def test_one_that_does_not_start_undoes_all(what: str) -> None:
    found = roster(1)
    found.begin(3, (), {})
    found.ready(1)
    orders = found.failed(2, "no memory") if what == "failed" else found.ready(2) or found.died(1, "no memory")
    if what == "died":  # all were ready: it served, and is replaced like any other
        assert orders == [Replace(1)]
        return
    assert orders == [End(1), End(2)]
    assert found.ready(2) == []
    assert found.resize is not None
    found.ended(1)
    found.ended(2)
    assert found.last == undone(1, 3, "replica 2 did not start: no memory")
    assert found.serving() == [0]


def test_one_that_was_ready_and_dies_before_the_others_are_undoes_all() -> None:
    found = roster(1)
    found.begin(3, (), {})
    found.ready(1)
    assert found.died(1, "killed") == [End(1), End(2)]
    assert found.cancel("again") == []


def test_cancelled_before_the_commit() -> None:
    found = roster(2)
    found.begin(1, (), {})
    assert found.cancel("by the user") == [Keep(1)]
    assert found.last == undone(2, 1, "by the user", "cancelled")
    assert found.serving() == [0, 1]
    found.begin(3, (), {})
    assert found.cancel("by the user") == [End(2)]
    found.ended(2)
    assert found.last == undone(2, 3, "by the user", "cancelled")
    assert found.cancel("nothing is under way") == []


def test_a_leaving_replica_that_dies_has_left() -> None:
    found = roster(3)
    found.begin(1, (), {})
    assert found.died(2, "killed") == []
    assert found.cancel("by the user") == [Keep(1), Replace(2)], "undone, it is one that died while it served"
    assert found.size == 3
    found.begin(1, (), {})
    found.died(1, "killed")
    assert found.serving() == [0]


def test_the_last_that_was_to_stay_dies_and_those_that_leave_serve_again() -> None:
    found = roster(3)
    found.begin(1, (1, 2), {})
    assert found.died(0, "killed") == [Replace(0), Keep(1), Keep(2)]
    assert found.last == undone(3, 1, "replica 0, which was to stay, died: killed")
    assert found.serving() == [1, 2]
    assert found.ready(0) == []
    assert found.serving() == [0, 1, 2]


def test_the_last_that_was_to_stay_is_started_again_and_those_that_leave_serve_again() -> None:
    found = roster(4)
    assert found.restarting([0, 1]) == []
    found.begin(2, (2, 3), {})
    assert found.restarting([]) == found.restarting([0]) == found.restarting([0, 2, 3]) == []
    assert found.restarting([0, 1, 2, 3]) == [], "nobody is better off"
    assert found.restarting([0, 1, 2]) == [Keep(2), Keep(3)]
    assert found.last == undone(4, 2, "none of those that were to stay serves now: 0, 1, started again")
    assert found.restarting([0, 1, 2]) == []
    assert found.serving() == [0, 1, 2, 3]


def test_those_that_leave_and_have_died_are_nobody_s_rescue() -> None:
    found = roster(3)
    found.begin(1, (1, 2), {})
    assert found.died(1, "killed") == []
    assert found.restarting([0, 2]) == []
    assert found.restarting([0]) == [Replace(1), Keep(2)]
    found = roster(3)
    found.died(0, "killed")
    found.died(1, "killed")
    found.begin(2, (), {})
    assert found.phases == {0: "dead", 1: "leaving", 2: "serving"}
    assert found.restarting([2]) == []


def test_one_of_several_that_stay_dies_and_the_resize_goes_on() -> None:
    found = roster(3)
    found.begin(2, (2,), {})
    assert found.died(0, "killed") == [Replace(0)]
    assert found.emptied(2) == [End(2)]
    found.ended(2)
    assert found.last == done(3, 2)


def test_where_nothing_is_replaced_one_that_dies_is_gone() -> None:
    found = roster(3, replaces_dead=False)
    found.begin(2, (2,), {})
    assert found.died(0, "killed") == [End(0), Keep(2)], "who leaves is needed now"
    found.ended(0)
    assert dict(found.phases) == {1: "serving", 2: "serving"}
    found.begin(1, (1,), {})
    found.died(1, "killed")
    assert dict(found.phases) == {1: "ending", 2: "serving"}
    found.ended(1)
    assert found.last == done(2, 1)


def test_one_that_is_lost_is_missing_until_it_is_back_or_not_wanted_any_more() -> None:
    found = roster(3)
    assert found.lost(1, "its node is gone") == [End(1)]
    assert (found.size, found.num_missing) == (2, 1)
    assert found.lost(1, "again") == []
    found.ended(1)
    assert found.missing_because == "its node is gone"
    assert found.begin(3, (), {}, because="there is room again") == [Start(1)]
    assert (found.num_missing, found.missing_because) == (0, None), "not known yet"
    found.ready(1)
    assert (found.size, found.wanted, found.num_missing) == (3, 3, 0)
    found.begin(2, (0,), {}, because="its node is drained")
    found.emptied(0)
    found.ended(0)
    assert (found.size, found.wanted, found.num_missing) == (2, 3, 1)
    assert (found.num_lost, found.missing_because) == (2, "its node is drained")
    found.begin(2, (), {})
    assert (found.wanted, found.num_missing) == (2, 0), "as many as there are is what an operator wants"


def test_a_dead_one_that_finds_no_place_is_lost() -> None:
    found = roster(2)
    assert found.died(1, "killed") == [Replace(1)]
    assert found.lost(1, "its node is gone") == [End(1)]
    found.ended(1)
    assert (dict(found.phases), found.num_missing) == ({0: "serving"}, 1)


def test_one_that_was_to_stay_is_lost_and_those_that_leave_are_needed() -> None:
    found = roster(3)
    found.begin(2, (2,), {})
    assert found.lost(0, "its node is gone") == [End(0), Keep(2)]
    assert found.last == undone(3, 2, "replica 0, which was to stay, was lost: its node is gone")
    found.ended(0)
    assert (found.serving(), found.wanted) == ([1, 2], 3)


@pytest.mark.parametrize("phase", ["joining", "leaving"])
def test_one_that_is_lost_in_a_resize_is_as_one_that_dies(phase: str) -> None:
    found, other = roster(2), roster(2)
    for one in (found, other):
        one.begin(3 if phase == "joining" else 1, (), {})
    number = 2 if phase == "joining" else 1
    assert found.lost(number, "no room") == other.died(number, "no room")
    assert found.last == other.last


def test_what_is_refused() -> None:
    found = roster(2)
    for size, leaving, named in ((0, (), "data_parallel_size"), (1, (7,), "leaving"), (2, (1,), "leaving")):
        with pytest.raises(RequestError, match=named):
            found.begin(size, leaving, {})
    with pytest.raises(RequestError, match="at most 1 of 2 replicas leave for there to be 1"):
        found.begin(1, (0, 1), {})
    found.died(1, "killed")
    with pytest.raises(RequestError, match="at least one must serve"):
        found.begin(1, (0,), {})
    assert found.begin(2, (), {}) == []
    assert found.last == done(2, 2), "as it is"
    found.begin(3, (), {})
    with pytest.raises(ResizeUnderWayError, match="from 2 to 3 replicas is under way"):
        found.begin(1, (), {})


class Fleet(RuleBasedStateMachine):
    """Carries out orders in any order and fails, dies and cancels at any moment."""

    @initialize(size=st.integers(1, 4), replaces_dead=st.booleans())
    def make(self, size: int, replaces_dead: bool) -> None:
        self.roster = roster(size, replaces_dead=replaces_dead)
        self.replaces_dead = replaces_dead
        self.alive = set(range(size))
        self.todo: dict[int, Order] = {}
        """What is being done about each replica: one thing at a time."""
        self.before: set[int] = set(range(size))
        """Members when the resize under way began, less those that died and are not replaced."""
        self.num_lost = 0
        """Since then."""

    def carry_out(self, orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, Keep):
                self.todo.pop(order.number, None)
                assert order.number in self.alive
            else:
                self.todo[order.number] = order

    @precondition(lambda self: self.roster.resize is None)
    @rule(size=st.integers(1, 5), data=st.data())
    def begin(self, size: int, data: st.DataObject) -> None:
        members = sorted(self.members())
        most = max(len(members) - size, 0)
        leaving = data.draw(st.lists(st.sampled_from(members), max_size=most)) if most else []
        if leaving and set(leaving) >= set(self.roster.serving()):
            return
        self.before, self.num_lost = set(members), 0
        loads = {number: data.draw(st.integers(0, 3)) for number in members}
        self.carry_out(self.roster.begin(size, leaving, loads))

    @precondition(lambda self: self.todo)
    @rule(data=st.data(), succeeds=st.booleans())
    def make_progress(self, data: st.DataObject, succeeds: bool) -> None:
        self.finish(data.draw(st.sampled_from(sorted(self.todo))), succeeds)

    def finish(self, number: int, succeeds: bool) -> None:
        order = self.todo[number]
        if isinstance(order, Start | Replace) and not succeeds:
            if isinstance(order, Start):
                del self.todo[number]
            self.carry_out(self.roster.failed(number, "it could not"))
            return
        del self.todo[number]
        if isinstance(order, Start | Replace):
            self.alive.add(number)
            self.carry_out(self.roster.ready(number))
        elif isinstance(order, Empty):
            self.carry_out(self.roster.emptied(number))
        else:
            self.alive.discard(number)
            self.carry_out(self.roster.ended(number))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.remove(number)
        phase = self.roster.phases[number]
        if phase != "ending":
            self.todo.pop(number, None)
        if not self.replaces_dead and phase in ("serving", "leaving"):
            self.before.discard(number)
        self.carry_out(self.roster.died(number, "it was killed"))

    @precondition(lambda self: len(self.roster.serving()) > 1 or (self.roster.serving() and self.dead()))
    @rule(data=st.data())
    def lose_the_place(self, data: st.DataObject) -> None:
        """Of one that serves or is dead, as long as another one serves."""
        number = data.draw(st.sampled_from(sorted({*self.roster.serving(), *self.dead()})))
        if self.roster.serving() == [number]:
            return
        self.alive.discard(number)
        self.before.discard(number)
        self.num_lost += 1
        self.carry_out(self.roster.lost(number, "its node is gone"))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def start_engines_again(self, data: st.DataObject) -> None:
        """Those of replicas that live, by themselves."""
        down = data.draw(st.sets(st.sampled_from(sorted(self.alive))))
        resize, serving = self.roster.resize, set(self.roster.serving())
        is_open = resize is not None and resize.outcome is None
        could_serve = {number for number in self.alive - down if self.roster.phases[number] == "leaving"}
        self.carry_out(self.roster.restarting(down))
        if is_open and not serving - down:
            assert could_serve <= set(self.roster.serving()), "who could serve is kept when nobody else can"

    def dead(self) -> set[int]:
        return {number for number, phase in self.roster.phases.items() if phase == "dead"}

    @rule()
    def cancel(self) -> None:
        self.carry_out(self.roster.cancel("by the user"))

    def members(self) -> set[int]:
        return {number for number, phase in self.roster.phases.items() if phase in ("serving", "dead")}

    @invariant()
    def each_has_what_its_state_needs(self) -> None:
        if not hasattr(self, "roster"):
            return
        kinds = {"joining": Start, "dead": Replace, "ending": End, "leaving": Empty}
        prepared = self.roster.resize.prepared if self.roster.resize is not None else set()
        for number, phase in self.roster.phases.items():
            order = self.todo.get(number)
            if phase == "serving":
                assert number in self.alive and order is None
            elif number in prepared and phase in ("joining", "leaving"):
                assert order is None
                assert number in self.alive or phase == "leaving"
            else:
                assert isinstance(order, kinds[phase]), (number, phase, order)
        assert self.alive <= set(self.roster.phases), "an engine runs that nobody knows of"
        assert set(self.todo) <= set(self.roster.phases)

    @invariant()
    def somebody_serves_as_long_as_anybody_can(self) -> None:
        if hasattr(self, "roster") and not self.roster.serving():
            assert not any(self.roster.phases[number] == "leaving" for number in self.alive)

    @invariant()
    def what_is_not_done_is_as_before(self) -> None:
        last = getattr(self, "roster", None) and self.roster.last
        if not last or self.roster.resize is not None:
            return
        if last.ending != "done":
            assert self.members() == self.before
        elif self.replaces_dead:
            assert self.roster.size == last.size_asked_for - self.num_lost

    def teardown(self) -> None:
        """Whatever has happened, what is under way comes to an end, and all that are left serve."""
        if not hasattr(self, "roster"):
            return
        for _ in range(100):
            if not self.todo:
                break
            self.finish(min(self.todo), succeeds=True)
        assert self.roster.resize is None
        assert set(self.roster.phases.values()) <= {"serving"}
        assert self.alive == set(self.roster.phases)


class TestFleet(Fleet.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
