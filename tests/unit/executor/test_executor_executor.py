"""The executor's own rules, over a channel and a launcher that are lists: order, deadlines, one cause for a failure."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import msgspec
import pytest

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import (
    DeadlineError,
    DivergedError,
    EngineDeadError,
    FrameError,
    PeerDiedError,
    PhalanxError,
    StartError,
    UserError,
    WorkerError,
)
from phalanx.executor.cause import CAUSE_GRACE_S
from phalanx.executor.executor import LOAD_CALL, STOP_TIMEOUT_S, Executor
from phalanx.executor.guarding import Guarding
from phalanx.ledger.record import rolled
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigests
from phalanx.protocol.client import StartProgress
from phalanx.protocol.columns import ints
from phalanx.protocol.worker import (
    Call,
    Done,
    Failure,
    Loaded,
    Ping,
    Progress,
    Publish,
    Published,
    Reply,
    Step,
    StepIssued,
    StepPlan,
    StepResult,
    StepShape,
    Stop,
    WorkerMessage,
)
from phalanx.worker.spec import WorkerSpec

ChannelError = PeerDiedError | DeadlineError | FrameError


class ScriptedChannel:
    """Gives out what the test put in; records what is sent."""

    def __init__(self) -> None:
        self.sent: list[Call] = []
        self.script: deque[tuple[int, WorkerMessage] | ChannelError] = deque()
        self.put_error: PeerDiedError | None = None
        self.put_s = 0.0
        """An inline rank carries a call out while it is sent."""

    def put(self, message: Call, *, deadline_s: float) -> None:
        if self.put_error is not None:
            raise self.put_error
        self.sent.append(message)
        if self.put_s:
            time.sleep(self.put_s)

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        if not self.script:
            return None
        item = self.script[0]
        if isinstance(item, PhalanxError):
            raise item
        self.script.popleft()
        return (*item, ())

    def forget(self, reader: int) -> None:
        lasting = [
            item for item in self.script if not isinstance(item, PeerDiedError) or item.party != f"rank {reader}"
        ]
        self.script = deque(lasting)

    def close(self) -> None: ...


class ScriptedLauncher:
    def __init__(self) -> None:
        self.exited: dict[int, str] = {}
        self.closed_with: float | None = None

    def start(self, specs: Sequence[WorkerSpec]) -> None: ...

    def exits(self) -> dict[int, str]:
        return self.exited

    def close(self, timeout_s: float) -> None:
        self.closed_with = timeout_s


class Bench:
    def __init__(
        self,
        world_size: int = 2,
        step_timeout_s: float = 30.0,
        output_rank: int = 0,
        guarding: Guarding | None = None,
    ) -> None:
        self.channel = ScriptedChannel()
        self.launcher = ScriptedLauncher()
        self.executor = Executor(
            self.launcher,
            self.channel,
            world_size,
            step_timeout_s,
            output_ranks=[output_rank],
            resources=ExitStack(),
            guarding=guarding,
        )

    def say(self, *items: tuple[int, WorkerMessage] | ChannelError) -> None:
        self.channel.script.extend(items)


class Clock:
    """The executor's time, which passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("executor", "pending"):
            monkeypatch.setattr(f"phalanx.executor.{module}.time", SimpleNamespace(monotonic=lambda: self.now))


def plan(step: int) -> Step:
    return Step((StepPlan(1, step, StepShape(1, 1, 1), ints([0]), ints([1])),))


def failure(kind: str, message: str = "it broke", *, is_user_error: bool = False) -> Failure:
    return Failure("host", "", kind, message, "Traceback ...", is_user_error)


class Waiting:
    """Whoever has a line started, and then has its executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def note(self, progress: StartProgress) -> None: ...


def test_once_closed_it_holds_on_to_nobody_who_was_told_of_its_start() -> None:
    """Otherwise the two would be a circle, and its memory there until Python's collector comes."""
    bench = Bench(world_size=1)
    bench.say((0, Reply(LOAD_CALL, Loaded(1, "cpu", "float32"))))
    waiting = Waiting(bench.executor)
    bench.executor.await_loaded(waiting.note, 1.0)
    told = weakref.ref(waiting)
    bench.executor.close()
    del waiting
    assert told() is None


def test_the_output_rank_need_not_be_the_first() -> None:
    bench = Bench(world_size=4, output_rank=2)
    pending = bench.executor.step(plan(1))
    bench.say((2, Reply(1, StepResult(1, ints([5])))))
    assert bench.channel.sent[0].reply_ranks == (2,)
    assert pending.result() == (StepResult(1, ints([5])),)


def test_steps_resolve_in_order_and_only_the_output_rank_is_asked() -> None:
    bench = Bench()
    first, second = bench.executor.step(plan(1)), bench.executor.step(plan(2))
    assert [call.reply_ranks for call in bench.channel.sent] == [(0,), (0,)]
    assert not first.done()
    bench.say((0, Reply(1, StepResult(1, ints([11])))), (0, Reply(2, StepResult(2, ints([22])))))
    assert first.done()
    assert first.result()[0].step == 1
    assert second.result()[0].step == 2


def test_a_command_is_answered_by_all_ranks_in_rank_order() -> None:
    bench = Bench()
    pending = bench.executor.submit(Ping(), deadline_s=1)
    bench.say((1, Reply(1, Done())), (0, Reply(1, Done())))
    assert pending.result() == [Done(), Done()]


def test_a_missing_answer_is_an_error_that_names_who_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bench = Clock(monkeypatch), Bench()
    pending = bench.executor.submit(Ping(), deadline_s=0.01)
    bench.say((0, Reply(1, Done())))
    assert not pending.done()
    clock.now = 0.01
    with pytest.raises(DeadlineError, match="Ping from rank 1") as caught:
        pending.result()
    assert caught.value.party == "rank 1"


def test_a_rank_that_answers_gives_the_others_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bench = Clock(monkeypatch), Bench()
    pending = bench.executor.submit(Ping(), deadline_s=1.0)
    clock.now = 0.8
    bench.say((0, Reply(1, Done())))
    assert not pending.done()
    clock.now = 1.1
    with pytest.raises(DeadlineError, match="waited 1 s for Ping from rank 1"):
        pending.result()


def test_the_time_of_a_call_begins_when_the_one_before_it_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bench = Clock(monkeypatch), Bench(step_timeout_s=1.0)
    first, second = bench.executor.step(plan(1)), bench.executor.step(plan(2))
    clock.now = 0.9
    bench.say((0, Reply(1, StepResult(1, b""))))
    assert first.done()
    clock.now = 1.8
    assert not second.done()
    clock.now = 2.0
    with pytest.raises(DeadlineError, match="step 2 from rank 0"):
        second.done()


def test_the_answer_to_a_later_call_gives_an_earlier_one_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bench = Clock(monkeypatch), Bench(step_timeout_s=1.0)
    pinged, stepped = bench.executor.submit(Ping(), deadline_s=1.0), bench.executor.step(plan(1))
    clock.now = 0.9
    bench.say((0, Reply(1, Done())), (0, Reply(2, StepResult(1, b""))))
    assert not pinged.done()
    assert stepped.done()
    clock.now = 1.1
    with pytest.raises(DeadlineError, match="Ping from rank 1"):
        pinged.done()


def test_a_step_that_ends_too_late_in_this_process_is_an_error() -> None:
    bench = Bench(world_size=1, step_timeout_s=0.02)
    bench.channel.put_s = 0.05
    bench.say((0, Reply(1, StepResult(1, b""))))
    with pytest.raises(DeadlineError, match=r"waited 0\.0\d+ s for step 1 from rank 0") as caught:
        bench.executor.step(plan(1))
    assert caught.value.waited_s >= 0.05
    with pytest.raises(DeadlineError):
        bench.executor.step(plan(2))


def test_the_time_of_the_step_before_is_not_this_ones() -> None:
    bench = Bench(world_size=1, step_timeout_s=0.05)
    first = bench.executor.step(plan(1))
    bench.channel.put_s = 0.1  # as on a device: the second is sent when the first has ended
    bench.say((0, Reply(1, StepResult(1, b""))))
    second = bench.executor.step(plan(2))
    bench.say((0, Reply(2, StepResult(2, b""))))
    assert first.result() and second.result()


def test_a_late_step_that_failed_tells_its_failure() -> None:
    bench = Bench(world_size=1, step_timeout_s=0.02)
    bench.channel.put_s = 0.05
    bench.say((0, failure("ZeroDivisionError")))
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        bench.executor.step(plan(1))


def test_everybody_who_asked_is_told_of_a_failure() -> None:
    bench = Bench()
    told: list[tuple[int, Exception]] = []
    for number in range(2):
        bench.executor.on_failure(lambda error, number=number: told.append((number, error)))  # type: ignore[misc]
    error = FrameError("no message of ours")
    bench.say(error)
    with pytest.raises(FrameError):
        bench.executor.check_health()
    assert told == [(0, error), (1, error)]
    bench.executor.close()
    bench.executor.on_failure(lambda error: told.append((2, error)))
    assert told[2:] == [(2, error)]


def test_a_closed_executor_says_so() -> None:
    bench = Bench()
    pending = bench.executor.submit(Ping(), deadline_s=1)
    told: list[Exception] = []
    bench.executor.on_failure(told.append)
    bench.executor.close()
    bench.executor.on_failure(told.append)
    assert bench.launcher.closed_with == STOP_TIMEOUT_S
    num_sent = len(bench.channel.sent)
    for use in (pending.result, bench.executor.check_health, lambda: bench.executor.collective_rpc("whereabouts")):
        with pytest.raises(EngineDeadError, match="closed"):
            use()
    assert len(bench.channel.sent) == num_sent
    assert told == []


def test_a_failure_says_what_the_rank_did_but_for_a_step() -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    bench.say((1, msgspec.structs.replace(failure("KeyError"), phase="capturing")))
    with pytest.raises(WorkerError, match=r"^rank 1 on host, capturing: KeyError: it broke$"):
        pending.result()


def test_the_first_failure_is_final() -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    bench.say((1, failure("ZeroDivisionError")))
    with pytest.raises(WorkerError, match="rank 1 on host: ZeroDivisionError: it broke") as caught:
        pending.result()
    assert caught.value.traceback == "Traceback ..."
    with pytest.raises(WorkerError):
        bench.executor.step(plan(2))
    bench.executor.close()
    assert bench.launcher.closed_with == 0.0, "a failed run is killed, not asked to stop"


@pytest.mark.parametrize("error", [DeadlineError("a heartbeat", "node beta", 3.0), FrameError("no message of ours")])
def test_what_ends_the_channel_ends_the_run(error: DeadlineError | FrameError) -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    told: list[Exception] = []
    bench.executor.on_failure(told.append)
    bench.say(error)
    for _ in range(2):
        with pytest.raises(type(error)):
            pending.result()
    assert told == [error]
    bench.executor.close()
    assert bench.launcher.closed_with == 0.0, "nobody waits for a node that is gone"


def test_the_cause_is_told_from_its_consequences() -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    bench.say((0, failure("DeadlineError", "waited for rank 1")), (1, failure("ValueError", "the cause")))
    with pytest.raises(WorkerError, match="rank 1 on host: ValueError: the cause"):
        pending.result()


def test_a_rank_that_ends_after_its_failure_is_not_the_cause() -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    ended = PeerDiedError("rank 0", 123, "it closed its end of the queue")
    bench.say((0, failure("DeadlineError", "waited for rank 1")), ended, (1, failure("ValueError", "the cause")))
    with pytest.raises(WorkerError, match="rank 1 on host: ValueError: the cause"):
        pending.result()


def test_when_all_ranks_name_a_consequence_the_first_is_told_at_once() -> None:
    bench = Bench()
    pending = bench.executor.step(plan(1))
    bench.say((0, failure("CollectiveMismatchError", "first")), (1, failure("CollectiveMismatchError", "second")))
    began_at = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 on host: CollectiveMismatchError: first"):
        pending.result()
    assert time.monotonic() - began_at < CAUSE_GRACE_S


def test_a_failure_that_waits_to_be_read_explains_why_a_call_cannot_be_sent() -> None:
    bench = Bench()
    bench.executor.step(plan(1))
    bench.say((1, failure("ValueError", "the cause")), PeerDiedError("rank 1", 123))
    bench.channel.put_error = PeerDiedError("rank 1", 123)
    with pytest.raises(WorkerError, match="rank 1 on host: ValueError: the cause"):
        bench.executor.step(plan(2))


def test_workers_that_leave_one_by_one_are_waited_for() -> None:
    bench = Bench()
    bench.say(PeerDiedError("rank 0", 123, "it closed its end of the queue"))
    bench.executor.close()
    assert isinstance(bench.channel.sent[-1].body, Stop)
    assert bench.launcher.closed_with == STOP_TIMEOUT_S


def test_a_worker_that_is_killed_while_it_loads_is_named_with_its_end() -> None:
    bench = Bench()
    bench.launcher.exited[0] = "killed by SIGKILL"
    bench.say((0, Progress("loading", 5, 10)), PeerDiedError("rank 0", 123))
    with pytest.raises(PeerDiedError, match=r"rank 0 \(pid 123\) died: killed by SIGKILL"):
        bench.executor.await_loaded(lambda *_: None, 60.0)


def test_a_killed_worker_is_named_with_its_end() -> None:
    bench = Bench()
    bench.launcher.exited[1] = "killed by SIGKILL"
    pending = bench.executor.step(plan(1))
    bench.say((0, failure("PeerDiedError", "rank 1 died")), PeerDiedError("rank 1", 123))
    with pytest.raises(PeerDiedError, match=r"rank 1 \(pid 123\) died: killed by SIGKILL"):
        pending.result()


def test_a_users_mistake_in_a_worker_stays_one() -> None:
    bench = Bench()
    bench.say((1, failure("CheckpointError", "no such tensor", is_user_error=True)))
    with pytest.raises(UserError, match=r"^no such tensor$"):
        bench.executor.await_loaded(lambda *_: None, 1.0)


def test_loading_reports_progress_of_every_rank() -> None:
    bench = Bench()
    seen: list[StartProgress] = []
    loaded = [Loaded(rank, "cpu", "float32") for rank in range(2)]
    bench.say((1, Progress("loading", 5, 10)), (1, Reply(LOAD_CALL, loaded[1])), (0, Reply(LOAD_CALL, loaded[0])))
    assert bench.executor.await_loaded(seen.append, 1.0) == loaded
    assert seen == [StartProgress(1, "loading", 5, 10)]


def test_a_worker_that_ends_without_a_word_ends_the_start() -> None:
    bench = Bench()
    bench.launcher.exited[0] = "exit code 3"
    with pytest.raises(StartError, match="rank 0 did not start: exit code 3"):
        bench.executor.await_loaded(lambda *_: None, 60.0)


def test_what_a_rank_publishes_goes_to_all_once_all_have_come() -> None:
    bench = Bench()
    pending = bench.executor.submit(Ping(), deadline_s=1)
    first, second, third = (Publish(1, "tp", key, b"") for key in "abc")
    bench.say((0, Progress("joining", 0, 0)), (0, first), (0, second))
    assert not pending.done()
    assert not pending.done()
    assert not pending.done()
    assert len(bench.channel.sent) == 1, "rank 1 takes nothing in yet"
    bench.say((1, Progress("joining", 0, 0)), (1, third), (0, Reply(1, Done())), (1, Reply(1, Done())))
    assert pending.result() == [Done(), Done()]
    assert [call.body for call in bench.channel.sent[1:]] == [Published((first, second)), Published((third,))]
    assert all(call.reply_ranks == () for call in bench.channel.sent[1:])


def issued(step: int, *digests: int) -> bytes:
    """What a rank says that has issued these in its one group."""
    writing = StepDigests(memoryview(bytearray(BOARD_BYTES)), 1)
    writing.begin(step)
    for digest in digests:
        writing.fold(1, rolled(0, digest))
    return writing.leave()


def test_no_token_of_a_step_in_which_ranks_diverged() -> None:
    group = GroupSpec("tp", "gloo", (0, 1), 1, 1.0, 1.0)
    config = Config.build(model="m", tensor_parallel_size=2)
    specs = [
        WorkerSpec(
            rank=rank,
            local_rank=0,
            ranks_on_host=1,
            device="cpu",
            config=config,
            checkpoint="m",
            epoch=1,
            groups=(group,),
            queue=None,
        )
        for rank in (0, 1)
    ]
    bench = Bench(guarding=Guarding(specs, ExitStack()))
    first, second, third = (bench.executor.step(plan(step)) for step in (1, 2, 3))
    bench.say((0, Reply(1, StepResult(1, b""), issued(1, 5))), (1, StepIssued(issued(1, 5))))
    assert first.result() == (StepResult(1, b""),)
    bench.say((1, StepIssued(issued(2, 6))), (0, Reply(2, StepResult(2, b""), issued(2, 5))))
    ends: list[PhalanxError] = []
    bench.executor.on_failure(ends.append)
    with pytest.raises(DivergedError, match="step 2, group tp") as caught:
        second.result()
    assert caught.value.ranks == (0, 1)
    with pytest.raises(DivergedError):
        third.result()
    assert ends == [caught.value]
