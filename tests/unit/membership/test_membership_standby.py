"""The keeper of a standby line, with lines that are none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

import phalanx.membership.standby as standby_module
from phalanx.errors import DeadlineError, PeerDiedError, StartError
from phalanx.membership.lines import Interruption, Line
from phalanx.membership.standby import Standby

WITHIN_S = 20.0


class FakePing:
    def __init__(self, executor: FakeExecutor) -> None:
        self._executor = executor

    def done(self) -> bool:
        if self._executor.error is not None:
            raise self._executor.error
        return True


class FakeExecutor:
    failure = None

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.end_error: Exception | None = None
        self.pinged = threading.Event()
        self.ended = threading.Event()

    def submit(self, *_: object, **__: object) -> FakePing:
        self.pinged.set()
        return FakePing(self)

    def kill(self) -> None: ...

    def close(self) -> None:
        self.ended.set()
        if self.end_error is not None:
            raise self.end_error


class Workshop:
    """Prepares lines one after the other, each when it may; counts them."""

    def __init__(self) -> None:
        self.executors: list[FakeExecutor] = []
        self.errors: list[Exception] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Semaphore(0)

    def prepare(self, interruption: Interruption) -> Line:
        self.has_begun.release()
        while not self.may_go_on.wait(0.01):
            if interruption.is_set:
                raise StartError("rank 0", "starting", "killed by SIGKILL")
        if self.errors:
            raise self.errors.pop(0)
        self.executors.append(FakeExecutor())
        return Line(len(self.executors), cast(Any, self.executors[-1]), {})


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setattr(standby_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(standby_module, "LOOK_S", 0.01)
    monkeypatch.setattr(standby_module, "FIRST_PAUSE_S", 0.01)
    return Workshop()


@pytest.fixture
def standby(workshop: Workshop) -> Iterator[Standby]:
    standby = Standby(workshop.prepare)
    yield standby
    standby.close()
    assert all(executor.ended.is_set() for executor in workshop.executors if executor.error is None)


def taken(standby: Standby) -> Line:
    while (line := standby.take(WITHIN_S)) is None:  # it may not have begun
        standby.renew()
    return line


def test_one_is_prepared_and_another_after_it_was_taken(standby: Standby, workshop: Workshop) -> None:
    first = taken(standby)
    assert standby.state == "preparing" and standby.take(0.0) is None, "none is prepared before it is asked for"
    standby.renew()
    assert taken(standby).epoch == 2
    first.executor.close()
    workshop.executors[1].close()


def test_who_takes_waits_for_one_that_is_being_prepared(workshop: Workshop) -> None:
    workshop.may_go_on.clear()
    standby = Standby(workshop.prepare)
    assert workshop.has_begun.acquire(timeout=WITHIN_S)
    assert standby.take(0.0) is None
    threading.Timer(0.05, workshop.may_go_on.set).start()
    line = standby.take(WITHIN_S)
    assert line is not None and not workshop.executors[0].ended.is_set()
    standby.close()


def test_one_that_is_lost_is_ended_and_replaced(standby: Standby, workshop: Workshop) -> None:
    while not workshop.executors:
        assert workshop.has_begun.acquire(timeout=WITHIN_S)
    first = workshop.executors[0]
    assert first.pinged.wait(WITHIN_S)
    first.error = PeerDiedError("rank 1", 7)
    assert first.ended.wait(WITHIN_S)
    assert taken(standby).epoch == 2 and standby.num_faults == 1
    workshop.executors[1].close()


def test_one_that_cannot_be_ended_is_counted_and_others_come(
    standby: Standby, workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    while not workshop.executors:
        assert workshop.has_begun.acquire(timeout=WITHIN_S)
    first = workshop.executors[0]
    first.end_error = DeadlineError("the end after SIGKILL", "rank 1", 10.0)
    first.error = PeerDiedError("rank 1", 7)
    assert first.ended.wait(WITHIN_S)
    assert taken(standby).epoch == 2 and standby.num_faults == 2
    assert "a standby line (epoch 1) did not end" in caplog.text
    workshop.executors[1].close()


def test_how_long_one_takes_is_known_from_the_one_before(workshop: Workshop) -> None:
    workshop.may_go_on.clear()
    standby = Standby(workshop.prepare)
    assert workshop.has_begun.acquire(timeout=WITHIN_S)
    assert standby.due_in_s == 0.0, "of the first one nothing is known"
    threading.Event().wait(0.05)
    workshop.may_go_on.set()
    taken(standby).executor.close()
    assert standby._took_s >= 0.05
    standby._took_s = 1000.0
    workshop.may_go_on.clear()
    standby.renew()
    assert workshop.has_begun.acquire(timeout=WITHIN_S)
    assert 900.0 < standby.due_in_s <= 1000.0
    standby.close()
    assert standby.due_in_s == 0.0


def test_one_that_does_not_come_up_is_tried_again(workshop: Workshop) -> None:
    workshop.errors = [StartError("rank 0", "starting", "no reason"), OSError("no memory")]
    standby = Standby(workshop.prepare)
    for _ in range(3):
        assert workshop.has_begun.acquire(timeout=WITHIN_S)
    while standby.state != "ready":
        threading.Event().wait(0.01)
    assert standby.num_faults == 2
    standby.close()
    assert workshop.executors[0].ended.is_set()


def test_what_is_discarded_is_ended_whether_it_is_ready_or_not(workshop: Workshop) -> None:
    standby = Standby(workshop.prepare)
    while standby.state != "ready":
        threading.Event().wait(0.01)
    standby.discard()
    assert workshop.executors[0].ended.is_set()
    workshop.may_go_on.clear()
    standby.renew()
    for _ in range(2):
        assert workshop.has_begun.acquire(timeout=WITHIN_S)
    standby.discard()
    assert standby.take(WITHIN_S) is None and standby.num_faults == 0
    standby.close()
    assert len(workshop.executors) == 1


def test_closing_ends_a_start_that_is_under_way(workshop: Workshop) -> None:
    workshop.may_go_on.clear()
    standby = Standby(workshop.prepare)
    assert workshop.has_begun.acquire(timeout=WITHIN_S)
    standby.close()
    assert not workshop.executors


class Kills:
    """Prepares lines whose start an interruption would end, and sees whether one does."""

    def __init__(self) -> None:
        self.num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1

    def prepare(self, interruption: Interruption) -> Line:
        interruption.note(cast(Any, self))
        return Line(1, cast(Any, FakeExecutor()), {})


def test_a_line_that_was_taken_is_not_ended_with_what_is_discarded() -> None:
    """From then on it is the one that computes."""
    kills = Kills()
    standby = Standby(kills.prepare)
    try:
        taken(standby)
        standby.discard()
        assert not kills.num_kills
    finally:
        standby.close()


def test_one_that_comes_up_while_it_is_discarded_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would then be killed, which to its watcher would be a fault."""
    kills, has_begun, may_end = Kills(), threading.Event(), threading.Event()
    states: list[str] = []

    def prepare(interruption: Interruption) -> Line:
        has_begun.set()
        assert may_end.wait(WITHIN_S)
        return kills.prepare(Interruption())

    def begin(_: Interruption) -> None:
        may_end.set()
        with standby._changed:
            standby._changed.wait_for(lambda: not standby._is_preparing, WITHIN_S)
        states.append(standby.state)

    monkeypatch.setattr(Interruption, "begin", begin)
    standby = Standby(prepare)
    assert has_begun.wait(WITHIN_S)
    standby.discard()
    standby.close()
    assert states[0] == "preparing"


def test_one_that_stands_ready_is_ended_by_who_discards_it() -> None:
    """And not killed before: to its watcher that would be a fault."""
    let_go: list[Line] = []
    kills = Kills()
    standby = Standby(kills.prepare)
    while standby.state != "ready":
        threading.Event().wait(0.01)
    standby.discard(let_go.append)
    standby.close()
    assert [line.epoch for line in let_go] == [1] and not kills.num_kills
