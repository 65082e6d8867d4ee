"""The inline rank's waits, over a worker whose device is as fast as a test says."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import pytest

from phalanx.errors import DeadlineError
from phalanx.executor.inline import InlineRank
from phalanx.protocol.columns import ints
from phalanx.protocol.worker import Call, Done, Failure, Ping, Reply, Step, StepPlan, StepResult, StepShape


class FakeWorker:
    """A worker on a GPU that is at work until `ends_at`."""

    phase = "stepping"
    call_id = 1

    def __init__(self) -> None:
        self.ends_at = 0.0
        self.error: Exception | None = None
        self.flights: deque[Reply] = deque()
        self.accepted: list[Call] = []

    def accept(self, call: Call) -> None:
        self.accepted.append(call)
        if isinstance(call.body, Step):
            self.flights.append(Reply(call.call_id, StepResult(call.body.number, b"")))
        else:
            assert not self.flights, "the worker waits for its steps, and for ever"
            self.flights.append(Reply(call.call_id, Done()))

    def next_reply(self, *, block: bool) -> Reply | None:
        assert not block, "a wait without a deadline"
        if time.monotonic() < self.ends_at:
            return None
        reply = self.flights.popleft()
        if self.error is not None:
            raise self.error
        return reply

    @property
    def is_busy(self) -> bool:
        return bool(self.flights)


def rank_over(worker: FakeWorker) -> InlineRank:
    rank = InlineRank({}, 1, lambda progress: None)
    rank._worker = worker  # type: ignore[assignment]
    return rank


def step(number: int) -> Call:
    plan = StepPlan(1, number, StepShape(1, 1, 1), ints([0]), ints([1]))
    return Call(number, Step((plan,)), (0,))


def got(rank: InlineRank, timeout_s: float) -> Any:
    found = rank.get(timeout_s=timeout_s)
    return None if found is None else found[1]


def test_a_step_that_never_ends_on_the_device_is_awaited_until_the_deadline() -> None:
    worker = FakeWorker()
    worker.ends_at = float("inf")
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    began_at = time.monotonic()
    assert got(rank, 0.05) is None
    assert 0.05 <= time.monotonic() - began_at < 1.0


def test_a_step_is_answered_as_soon_as_it_has_ended() -> None:
    worker = FakeWorker()
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    worker.ends_at = time.monotonic() + 0.05
    assert got(rank, 0.0) is None
    assert got(rank, 10.0) == Reply(1, StepResult(1, b""))
    assert time.monotonic() - worker.ends_at < 1.0


def test_another_call_waits_for_the_steps_and_keeps_their_answers() -> None:
    worker = FakeWorker()
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    rank.put(step(2), deadline_s=1.0)
    worker.ends_at = time.monotonic() + 0.05
    rank.put(Call(3, Ping(), (0,)), deadline_s=10.0)
    assert [got(rank, 0.0).call_id for _ in range(3)] == [1, 2, 3]


def test_another_call_does_not_wait_for_ever_for_the_steps() -> None:
    worker = FakeWorker()
    worker.ends_at = float("inf")
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    with pytest.raises(DeadlineError, match=r"waited 0\.05 s for the end of the steps under way from rank 0"):
        rank.put(Call(2, Ping(), (0,)), deadline_s=0.05)
    assert len(worker.accepted) == 1


def test_what_the_device_reports_is_the_ranks_failure() -> None:
    worker = FakeWorker()
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    worker.error = RuntimeError("CUDA error")
    told = got(rank, 1.0)
    assert isinstance(told, Failure) and told.kind == "RuntimeError"


class BrokenWorker(FakeWorker):
    """Its device reports the same error for ever, and its steps never end."""

    def next_reply(self, *, block: bool) -> Reply | None:
        raise RuntimeError("CUDA error")


def test_a_device_that_is_broken_for_good_fails_once_and_ends_the_wait() -> None:
    worker = BrokenWorker()
    rank = rank_over(worker)
    rank.put(step(1), deadline_s=1.0)
    rank.put(Call(2, Ping(), (0,)), deadline_s=10.0)
    assert [type(message) for message in rank._messages] == [Failure]
    assert [call.call_id for call in worker.accepted] == [1], "nothing is asked of it any more"
