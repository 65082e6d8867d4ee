"""The loop of a rank in a process of its own, on a device that computes in virtual time."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigestReader, count_of, told
from phalanx.protocol.worker import (
    FIRST_EPOCH,
    Call,
    CallMethod,
    MethodResult,
    Ping,
    Reply,
    Step,
    StepIssued,
    StepPlan,
    StepResult,
    StepShape,
    WorkerMessage,
)
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.exchange import BrainExchange
from phalanx.worker.methods import encode_arguments
from phalanx.worker.process import LOOK_AT_DEVICE_S, _turn
from phalanx.worker.runner import InFlight
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

STEP_S = 0.010
PLAN_S = 0.0003
"""From an answer to the plan that the brain makes of it."""
NUM_STEPS = 10
MAX_LOOKS = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


class Event:
    """The end of a step, at `at_s`."""

    def __init__(self, bench: Bench, at_s: float) -> None:
        self.at_s = at_s
        self._bench = bench

    def query(self) -> bool:
        return self._bench.now_s >= self.at_s

    def synchronize(self) -> None:
        self._bench.now_s = max(self._bench.now_s, self.at_s)


class Bench:
    """A worker whose steps take STEP_S, and a brain that has up to `depth` of them under way."""

    def __init__(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, depth: int = 2, is_gpu: bool = True, **settings: Any
    ) -> None:
        self.now_s = 0.0
        self.launched_at_s: list[float] = []
        self.ended_at_s: list[float] = []
        self.answered_at_s: list[float] = []
        self.timeouts: list[float | None] = []
        """Of each look for a call."""
        self.answers: list[Reply] = []
        self.calls: deque[tuple[float, Call]] = deque((0.0, step(i)) for i in range(depth))
        self._depth = depth
        self._is_gpu = is_gpu
        monkeypatch.setattr("phalanx.worker.exchange.time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.exchange = BrainExchange(FIRST_EPOCH, "", lambda _: None, self._get)
        self.worker = Worker(spec(checkpoint, **settings), lambda _: None)
        self.worker._runner = self  # type: ignore[assignment]

    def launch(self, step: Step) -> InFlight:
        began_at_s = max([self.now_s, *self.ended_at_s[-1:]])
        self.launched_at_s.append(self.now_s)
        self.ended_at_s.append(began_at_s + STEP_S)
        arrived: Any = Event(self, began_at_s + STEP_S)
        if not self._is_gpu:
            arrived.synchronize()
        return InFlight(step.number, torch.empty(0), None, arrived if self._is_gpu else None)

    def finish(self, flight: InFlight) -> StepResult:
        if flight.arrived is not None:
            flight.arrived.synchronize()
        return StepResult(flight.step, b"")

    def run(self, num_answers: int) -> None:
        while len(self.answers) < num_answers:
            _turn(self.exchange, self.worker, self._put)

    def _put(self, message: WorkerMessage) -> None:
        assert isinstance(message, Reply)
        self.answers.append(message)
        self.answered_at_s.append(self.now_s)
        following = message.call_id + self._depth
        if following < NUM_STEPS:
            self.calls.append((self.now_s + PLAN_S, step(following)))

    def _get(self, timeout_s: float | None) -> Call | None:
        self.timeouts.append(timeout_s)
        assert len(self.timeouts) < MAX_LOOKS, "it burns a core"
        assert timeout_s is not None or self.calls, "for ever"
        comes_in_s = max(self.calls[0][0] - self.now_s, 0.0) if self.calls else float("inf")
        if timeout_s is not None and comes_in_s > timeout_s:
            self.now_s += timeout_s
            return None
        self.now_s += comes_in_s
        return self.calls.popleft()[1]


def spec(checkpoint: Path, **settings: Any) -> WorkerSpec:
    return WorkerSpec(
        rank=0,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=Config.build(model=str(checkpoint), **settings),
        checkpoint=str(checkpoint),
        epoch=FIRST_EPOCH,
        groups=(),
        queue=None,
    )


def step(number: int) -> Call:
    plan = StepPlan(FIRST_EPOCH, number, StepShape(1, 1, 1), b"", b"")
    return Call(number, Step((plan,)), (0,))


def test_a_gpu_is_given_the_next_step_while_one_computes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(checkpoint, monkeypatch)
    bench.run(NUM_STEPS)
    for launched_at_s, ended_at_s in zip(bench.launched_at_s[1:], bench.ended_at_s, strict=False):
        assert launched_at_s < ended_at_s
    assert bench.ended_at_s[-1] == pytest.approx(NUM_STEPS * STEP_S), "it never stands still"
    late_s = [answered - ended for answered, ended in zip(bench.answered_at_s, bench.ended_at_s, strict=True)]
    assert max(late_s[:-1]) == 0, "with enough to do it is the device that is awaited"
    assert late_s[-1] <= LOOK_AT_DEVICE_S
    num_looks = STEP_S / LOOK_AT_DEVICE_S  # while the last step computes, after which there is no other
    assert len(bench.timeouts) <= 3 * NUM_STEPS + 2 * num_looks, "rounding may split a look in two"


def test_without_async_scheduling_the_device_is_awaited_at_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(checkpoint, monkeypatch, depth=1, async_scheduling=False)
    bench.run(NUM_STEPS)
    assert bench.answered_at_s == bench.ended_at_s
    assert set(bench.timeouts) == {None, 0.0}
    assert len(bench.timeouts) <= 2 * NUM_STEPS


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_on_a_cpu_nothing_is_looked_at_twice(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    bench = Bench(checkpoint, monkeypatch, depth=depth, is_gpu=False)
    bench.run(NUM_STEPS)
    assert bench.answered_at_s == bench.ended_at_s
    assert set(bench.timeouts) == {None}, "a rank that has nothing to do sleeps until it is called"
    assert len(bench.timeouts) == NUM_STEPS


def test_a_pipelines_steps_wait_for_the_oldest(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its brain sends more of them than a device is to hold."""
    bench = Bench(checkpoint, monkeypatch, depth=4)
    bench.run(NUM_STEPS)
    assert [answer.call_id for answer in bench.answers] == list(range(NUM_STEPS))
    assert bench.ended_at_s[-1] == pytest.approx(NUM_STEPS * STEP_S)


def test_other_calls_are_answered_after_the_steps_before_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(checkpoint, monkeypatch)
    whereabouts = CallMethod("whereabouts", encode_arguments((), {}))
    bench.calls.extend([(0.0, Call(100, whereabouts, (0,))), (0.0, Call(101, Ping(), (0,)))])
    bench.run(4)
    assert [answer.call_id for answer in bench.answers] == [0, 1, 100, 101]
    assert isinstance(bench.answers[2].body, MethodResult)
    assert bench.answered_at_s[2:] == [2 * STEP_S] * 2


def run_step_of_two(
    checkpoint: Path, reply_ranks: tuple[int, ...], board: SegmentHandle | None = None
) -> list[Reply | StepIssued]:
    """All that the first of two ranks says of a step in which it issued one collective."""
    worker = Worker(
        msgspec.structs.replace(
            spec(checkpoint, tensor_parallel_size=2),
            groups=(GroupSpec("tp@0", "shm", (0, 1), FIRST_EPOCH, 1.0, 1.0),),
            board=board,
        ),
        lambda _: None,
    )
    digests = worker._notes.digests
    assert digests is not None

    def launch(plan: Step) -> InFlight:
        digests.fold(1, 0x55)
        return InFlight(plan.number, torch.empty(0), None, None)

    worker._runner = SimpleNamespace(launch=launch, finish=lambda flight: StepResult(flight.step, b""))  # type: ignore[assignment]
    call = step(41)
    worker.accept(Call(call.call_id, call.body, reply_ranks))
    said = []
    while (message := worker.next_reply(block=False)) is not None:
        said.append(message)
    return said


def test_what_was_issued_rides_on_the_answer(checkpoint: Path) -> None:
    (reply,) = run_step_of_two(checkpoint, (0,))
    assert isinstance(reply, Reply) and isinstance(reply.body, StepResult)
    assert told(reply.issued).step == 42 and [count_of(word) for word in told(reply.issued).words] == [0, 1]


def test_a_rank_that_does_not_answer_says_it_in_a_message(checkpoint: Path) -> None:
    (reply,) = run_step_of_two(checkpoint, (0,))
    assert run_step_of_two(checkpoint, (1,)) == [StepIssued(reply.issued)]


def test_nor_does_it_where_the_brain_can_look(checkpoint: Path) -> None:
    (reply,) = run_step_of_two(checkpoint, (0,))
    with SharedSegment.create(BOARD_BYTES, "board") as segment:
        reader = StepDigestReader(segment.buf, 1)
        assert run_step_of_two(checkpoint, (1,), segment.handle) == []
        assert reader.read(42) == told(reply.issued)
