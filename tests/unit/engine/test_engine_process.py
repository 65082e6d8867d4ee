"""The engine's loop in this process, against a real stream, with an EchoBrain and no workers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import engine_tiny_tokenizers as tiny
import msgspec
import numpy as np
import pytest
from engine_echo_brain import EchoBrain

import phalanx.engine.process as process
from phalanx.config import Config
from phalanx.engine.core import EngineCore
from phalanx.errors import CheckpointError, ConfigError, NotHealedError, PeerDiedError, RequestError, WorkerError
from phalanx.membership.formation import Healed
from phalanx.memory.shared_weights import SharedWeights, WeightsKind, encode_shared
from phalanx.protocol.client import (
    AvoidNodes,
    Begin,
    Cancel,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineStats,
    FormationStats,
    ReplicaStats,
    ShareWeights,
    Shutdown,
    StartProgress,
    Submit,
    TokenBatch,
    WeightsShared,
)
from phalanx.protocol.columns import Message, WrongSetting, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.transport.liveness import Party
from phalanx.transport.stream import Stream, stream_pair

DEADLINE_S = 20.0


class FakePing:
    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        return True


class FakeHealing:
    """A recovery that ends when a test says so."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.error: Exception | None = None

    def wait(self, timeout_s: float) -> bool:
        return self.is_over.wait(timeout_s)

    def result(self) -> Healed:
        if self.error is not None:
            raise self.error
        return Healed(epoch=2, keeps_cache=True)


class FakeFormation:
    """No workers; `error` is what looking after them finds."""

    nodes = ("alpha", "beta")

    def __init__(self) -> None:
        self.config: Config | None = None
        self.capacity: Any = None
        self.heals_error: Exception | None = None
        self.healing = FakeHealing()
        self.num_progressed = 0
        self.told: FormationStats | None = None
        self.error: Exception | None = None
        self.is_closed = False
        self.pinged = threading.Event()
        self.offered: SharedWeights | None = None
        self.shared: SharedWeights | None = None

    def step(self, plan: object) -> None:
        """As an inline rank: it is carried out here and now."""
        time.sleep(0.2)

    def heals(self, error: Exception) -> bool:
        return error is self.heals_error

    def begin_healing(self, error: Exception) -> FakeHealing:
        return self.healing

    def progressed(self) -> None:
        self.num_progressed += 1

    def stats(self) -> FormationStats | None:
        return self.told

    def avoid(self, nodes: tuple[str, ...]) -> None:
        self.nodes = nodes

    def share_weights(self) -> SharedWeights | None:
        return self.shared

    def submit(self, body: Message, *, deadline_s: float) -> FakePing:
        self.pinged.set()
        return FakePing(self.error)

    def __enter__(self) -> FakeFormation:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


class Engine:
    """`process.serve` in a thread, and the client's end of its stream."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.executor = FakeFormation()
        self.start_error: Exception | None = None
        self.brain = EchoBrain()
        monkeypatch.setattr(process, "resolve", lambda *_, **__: SimpleNamespace(path=path))
        monkeypatch.setattr("phalanx.engine.core.start_formation", self._start_formation)
        monkeypatch.setattr("phalanx.engine.core.Brain", self._make_brain)
        ours, theirs = stream_pair()
        self.stream = Stream(ours, Party.of("the engine", os.getpid()))
        self.link = process.ClientLink(Stream(theirs, Party.of("the server", os.getpid())))
        self._pool = ThreadPoolExecutor(1)
        self._config = config
        self.weights = b""
        self._received: list[bytes] = []

    def start(self) -> None:
        self._exit_code = self._pool.submit(process.serve, self.link)
        self.send(Begin(self._config, self.weights))

    def start_when_client_has_gone(self) -> None:
        """The client leaves after its configuration."""
        self.send(Begin(self._config, self.weights))
        self.stream.close()
        self._exit_code = self._pool.submit(process.serve, self.link)

    def start_and_be_ready(self) -> None:
        self.start()
        self.receive(EngineReady)

    def _start_formation(self, config: Config, checkpoint: Any, on_progress: Any, offered: Any) -> FakeFormation:
        self.executor.offered = offered
        try:
            on_progress(StartProgress(1, "loading", 1, 2))
        except Exception as error:  # as the inline rank does with whatever comes out of its worker
            raise WorkerError(0, "here", type(error).__name__, str(error), "traceback") from error
        if self.start_error is not None:
            raise self.start_error
        self.executor.config = config
        self.executor.capacity = SimpleNamespace(
            max_model_len=64, num_blocks=8, block_size=config.cache.block_size, world_size=2, device="cpu", dtype="f"
        )
        return self.executor

    def _make_brain(self, config: Config, executor: Any, **_: Any) -> EchoBrain:
        self.executor_of_brain = executor
        return self.brain

    def send(self, message: Message) -> None:
        self.stream.send(msgspec.msgpack.encode(message), deadline_s=DEADLINE_S)

    def receive(self, kind: type[EngineMessage]) -> Any:
        """The next message of this kind; others before it are dropped."""
        while True:
            while not self._received:
                assert self.stream.wait(DEADLINE_S), f"no {kind.__name__}"
                self._received = self.stream.poll()
            message = msgspec.msgpack.decode(self._received.pop(0), type=EngineMessage)
            if isinstance(message, kind):
                return message

    def exit_code(self) -> int:
        return self._exit_code.result(DEADLINE_S)

    def close(self) -> None:
        self.stream.close()
        self._pool.shutdown()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    directory = tiny.save(tiny.byte_level(), tmp_path)
    engine = Engine(Config.build(model=str(directory), block_size=4), monkeypatch, directory)
    yield engine
    engine.close()


def submit(request_id: int, max_tokens: int | None) -> Submit:
    return Submit(request_id, ints([5, 6]), SamplingParams(max_tokens=max_tokens))


def test_start_is_told_with_its_progress(engine: Engine, tmp_path: Path) -> None:
    engine.start()
    assert engine.receive(StartProgress) == StartProgress(1, "loading", 1, 2)
    assert engine.receive(EngineReady) == EngineReady(64, 8, 4, 2, "cpu", "f", checkpoint=str(tmp_path))


def test_tokens_and_stats_go_to_the_client_and_shutdown_ends_it(engine: Engine) -> None:
    engine.start_and_be_ready()
    engine.send(submit(3, max_tokens=2))
    first, second = engine.receive(TokenBatch), engine.receive(TokenBatch)
    assert [np.frombuffer(batch.tokens, dtype=np.int32).tolist() for batch in (first, second)] == [[5], [6]]
    assert [request_id for request_id, _ in second.finished] == [3]
    while engine.receive(EngineStats).replicas[0].num_running:
        pass
    engine.send(Shutdown())
    assert engine.exit_code() == 0
    assert engine.executor.is_closed


def test_it_tells_where_ranks_are_and_passes_on_where_none_is_to_come(engine: Engine) -> None:
    engine.start_and_be_ready()
    assert engine.receive(EngineStats).nodes == ("alpha", "beta")
    engine.send(AvoidNodes(("gamma",)))
    while engine.receive(EngineStats).nodes != ("gamma",):  # so does the fake one show it
        pass


SHARED = SharedWeights(WeightsKind(b"12", "float32", 1, 1, True, ("1.0",)), ())


def test_weights_are_had_from_others_and_given_to_others(engine: Engine) -> None:
    engine.weights = encode_shared(SHARED)
    engine.start_and_be_ready()
    assert engine.executor.offered == SHARED
    engine.send(ShareWeights(3))
    assert engine.receive(WeightsShared) == WeightsShared(3, b""), "of ranks that have none to share"
    engine.executor.shared = SHARED
    engine.send(ShareWeights(4))
    assert engine.receive(WeightsShared) == WeightsShared(4, encode_shared(SHARED))


def test_no_weights_are_shared_while_ranks_are_replaced(engine: Engine) -> None:
    engine.executor.shared = SHARED
    engine.start_and_be_ready()
    break_a_step(engine)
    engine.send(submit(3, max_tokens=1))
    assert engine.receive(EngineStats).formation == HEALING
    engine.send(ShareWeights(4))
    assert engine.receive(WeightsShared) == WeightsShared(4, b"")


def test_it_tells_that_nodes_are_avoided_but_while_ranks_get_their_places(engine: Engine) -> None:
    engine.start_and_be_ready()
    engine.send(AvoidNodes(("gamma",)))
    while engine.receive(EngineStats).avoided != ("gamma",):
        pass
    break_a_step(engine)
    engine.send(submit(3, max_tokens=1))
    while engine.receive(EngineStats).avoided:
        pass
    engine.send(AvoidNodes(("gamma", "delta")))
    engine.executor.healing.is_over.set()
    while engine.receive(EngineStats).avoided != ("gamma", "delta"):
        pass


def test_an_idle_engine_gives_a_sign_of_life(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SIGN_OF_LIFE_S", 0.05)
    monkeypatch.setattr(process, "IDLE_CHECK_S", 0.05)
    engine.start_and_be_ready()
    first = engine.receive(EngineStats)
    assert engine.receive(EngineStats) == first
    assert engine.receive(EngineStats) == first


def test_an_engine_gives_a_sign_of_life_between_two_steps_of_one_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "SIGN_OF_LIFE_S", 0.1)
    monkeypatch.setattr(process, "STATS_INTERVAL_S", 0.1)
    step = engine.brain.step

    def step_twice() -> TokenBatch | None:
        engine.executor_of_brain.step(None)
        engine.executor_of_brain.step(None)
        return step()

    engine.brain.step = step_twice  # type: ignore[method-assign]
    engine.start_and_be_ready()
    while engine.receive(EngineStats).replicas[0].num_running:
        pass
    engine.send(submit(3, max_tokens=1))
    before_the_second_step = EngineStats((ReplicaStats(1, 0, 0, 10, 0, 0, 0, 0, 0),), nodes=("alpha", "beta"))
    assert engine.receive(EngineMessage) == before_the_second_step
    assert isinstance(engine.receive(EngineMessage), TokenBatch)


HEALING = FormationStats(1, True, "none", 1, {}, {}, 0, 0.0)


def break_a_step(engine: Engine) -> PeerDiedError:
    """The first step raises what the formation heals."""
    step, error = engine.brain.step, PeerDiedError("rank 1", 7)
    engine.executor.heals_error, engine.executor.told = error, HEALING

    def fail_once() -> TokenBatch | None:
        engine.brain.step = step  # type: ignore[method-assign]
        raise error

    engine.brain.step = fail_once  # type: ignore[method-assign]
    return error


def test_a_fault_that_is_healed_is_a_pause_in_which_requests_come(engine: Engine) -> None:
    engine.start_and_be_ready()
    error = break_a_step(engine)
    engine.send(submit(3, max_tokens=1))
    assert engine.receive(EngineStats).formation == HEALING, "the client hears of it, and that the engine lives"
    engine.send(submit(4, max_tokens=1))
    while engine.receive(EngineStats).replicas[0].num_running < 2:
        pass
    assert not engine.brain.rewinds and not engine.brain.num_steps
    engine.executor.told = FormationStats(2, False, "none", 1, {"new line": 1}, {}, 0, 0.5)
    engine.executor.healing.is_over.set()
    assert {request_id for request_id, _ in engine.receive(TokenBatch).finished} == {3, 4}
    assert engine.brain.rewinds == [(2, True, str(error))]
    while engine.receive(EngineStats).formation != engine.executor.told:
        pass


def test_an_engine_ends_in_good_order_while_it_heals(engine: Engine) -> None:
    engine.start_and_be_ready()
    break_a_step(engine)
    engine.send(submit(3, max_tokens=1))
    assert engine.receive(EngineStats).formation == HEALING
    engine.send(Shutdown())
    assert engine.exit_code() == 0 and engine.executor.is_closed


def test_a_fault_that_is_not_healed_ends_the_engine_and_says_what_was_tried(engine: Engine) -> None:
    engine.start_and_be_ready()
    break_a_step(engine)
    engine.executor.healing.error = NotHealedError("rank 1 died; it could not be healed: new line: no memory")
    engine.executor.healing.is_over.set()
    engine.send(submit(3, max_tokens=1))
    assert "could not be healed: new line: no memory" in engine.receive(EngineFailed).reason
    assert engine.exit_code() == 1


@pytest.mark.parametrize("num_committed", [0, 1])
def test_a_turn_that_commits_nothing_is_no_progress(num_committed: int) -> None:
    """It tells that requests have ended, which needs no ranks."""

    class OnlyTells(EchoBrain):
        def has_work(self) -> bool:
            return True

        def step(self) -> TokenBatch | None:
            self.num_steps += num_committed
            return None

    formation = FakeFormation()
    EngineCore(cast(Any, formation), cast(Any, OnlyTells()), cast(Any, None)).step()
    assert formation.num_progressed == num_committed


def test_cancel_reaches_the_brain(engine: Engine) -> None:
    engine.start_and_be_ready()
    engine.send(submit(3, max_tokens=None))
    engine.receive(TokenBatch)
    engine.send(Cancel((3,)))
    while not engine.receive(TokenBatch).finished:
        pass
    assert engine.brain.cancelled == [3]


def test_a_request_that_the_brain_refuses_ends_alone(engine: Engine) -> None:
    def refuse(_: Submit) -> None:
        raise RequestError("prompt", "9 tokens", "at most 8")

    engine.start_and_be_ready()
    engine.brain.submit = refuse  # type: ignore[method-assign]
    engine.send(submit(1, max_tokens=None))
    batch = engine.receive(TokenBatch)
    assert batch.finished == ((1, FinishReason.ERROR),)
    assert "at most 8" in dict(batch.errors)[1]
    engine.send(Shutdown())
    assert engine.exit_code() == 0


@pytest.mark.parametrize(
    ("error", "told", "exit_code"),
    [
        (
            ConfigError("block_size", 7, "16"),
            EngineFailed("block_size: 7 is not possible: 16", True, WrongSetting("block_size", 7, "16")),
            2,
        ),
        (
            ConfigError("stop", ["a"], "b"),
            EngineFailed("stop: ['a'] is not possible: b", True, WrongSetting("stop", "['a']", "b")),
            2,
        ),
        (CheckpointError("no config.json"), EngineFailed("no config.json", True), 2),
        (CheckpointError("no UTF-8: \udcff"), EngineFailed(r"no UTF-8: \udcff", True), 2),
        (ValueError("no UTF-8: \udcff"), EngineFailed(r"ValueError: no UTF-8: \udcff", False), 1),
        (
            WorkerError(1, "here", "RuntimeError", "boom", "Traceback"),
            EngineFailed("rank 1 on here: RuntimeError: boom", False),
            1,
        ),
        (ZeroDivisionError("oh"), EngineFailed("ZeroDivisionError: oh", False), 1),
    ],
)
def test_a_failed_start_is_told(engine: Engine, error: Exception, told: EngineFailed, exit_code: int) -> None:
    engine.start_error = error
    engine.start()
    assert engine.receive(EngineFailed) == told
    engine.stream.close()
    assert engine.exit_code() == exit_code


def test_a_failed_step_is_told_and_the_workers_are_ended(engine: Engine) -> None:
    engine.start_and_be_ready()
    engine.brain.step = lambda: 1 / 0  # type: ignore[assignment,return-value]
    engine.send(submit(1, max_tokens=None))
    assert "ZeroDivisionError" in engine.receive(EngineFailed).reason
    engine.stream.close()
    assert engine.exit_code() == 1
    assert engine.executor.is_closed


def test_a_worker_that_dies_while_nothing_runs_is_noticed(engine: Engine) -> None:
    engine.executor.error = PeerDiedError("rank 1", 77, "killed by SIGKILL")
    engine.start()
    assert "rank 1 (pid 77) died" in engine.receive(EngineFailed).reason
    engine.stream.close()
    assert engine.exit_code() == 1


def test_the_end_of_the_client_ends_the_engine(engine: Engine) -> None:
    engine.start_and_be_ready()
    engine.send(submit(1, max_tokens=None))
    engine.receive(TokenBatch)
    engine.stream.close()
    assert engine.exit_code() == 0
    assert engine.executor.is_closed


def test_a_client_that_leaves_during_the_start_is_no_fault(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.start_when_client_has_gone()
    assert engine.exit_code() == 0
    assert engine.executor.is_closed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_idle_engine_takes_no_cpu(engine: Engine) -> None:
    engine.start_and_be_ready()
    assert engine.executor.pinged.wait(DEADLINE_S)
    used_s, since = time.process_time(), time.monotonic()
    engine.executor.pinged.clear()
    assert engine.executor.pinged.wait(DEADLINE_S)
    assert time.process_time() - used_s < 0.1 * (time.monotonic() - since)
