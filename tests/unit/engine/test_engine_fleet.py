"""Several engines as one: requests are shared out, and what one engine suffers is not the others'."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import engine_tiny_tokenizers as tiny
import pytest
from engine_fake_process import NEVER_READY
from test_engine_client import ENDLESS, TIMEOUT_S, command, in_loop, until

from phalanx.config import Config
from phalanx.engine import seats
from phalanx.engine.client import EngineClient
from phalanx.engine.fleet import WATCH_POLL_S, Fleet, start_engine
from phalanx.engine.joining import Joining
from phalanx.engine.leaving import MOST_PASSES
from phalanx.engine.roster import Order
from phalanx.engine.seats import Seats, settings_of_replicas
from phalanx.engine.stream import RequestStream
from phalanx.errors import (
    ConfigError,
    DeadlineError,
    EngineDeadError,
    MaintenanceError,
    NotNowError,
    RequestError,
    ResizeError,
    ResizeRefusedError,
    ResizeUnderWayError,
    StartError,
)
from phalanx.executor import platform
from phalanx.memory.shared_weights import decode_shared
from phalanx.protocol.client import MaintenanceOrder, Reload, Sleep, StartProgress, Wake
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.generation import Generation
from phalanx.server.service import Service
from phalanx.transport.liveness import is_running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text('{"vocab_size": 400}')
    return tiny.save(tiny.byte_level(), directory)


def config_of(checkpoint: Path, **settings: Any) -> Config:
    """Its engines are not started again, unless `engine_restarts` says so."""
    return Config.build(model=str(checkpoint), **{"data_parallel_size": 3, "engine_restarts": 0, **settings})


@asynccontextmanager
async def fleet_of(checkpoint: Path, behaviour: str = "healthy", **settings: Any) -> AsyncIterator[Fleet]:
    async with asyncio.timeout(TIMEOUT_S):
        fleet = await Fleet.start(config_of(checkpoint, **settings), command=command(behaviour))
        try:
            yield fleet
        finally:
            await fleet.close()
            assert not any(map(is_running, pids(fleet)))


def pids(fleet: Fleet) -> list[int]:
    """Of engines, in the order of their replicas' numbers."""
    return [engine.condition.pid for _, engine in sorted(fleet._members.engines.items())]


def counts(fleet: Fleet) -> dict[int, int]:
    """Requests of each replica."""
    return {one.replica: one.num_requests for one in fleet.replicas()}


def states(fleet: Fleet) -> dict[int, str]:
    return {one.replica: one.state for one in fleet.replicas()}


async def consume(fleet: Fleet, first: int, sampling: SamplingParams) -> int:
    """The number of tokens that come."""
    deltas = [delta async for delta in fleet.generate([first, first + 1, first + 2], sampling)]
    return sum(len(delta.token_ids) for delta in deltas)


@in_loop
async def test_requests_are_shared_out_and_counted_by_replica(checkpoint: Path) -> None:
    async with fleet_of(checkpoint) as fleet:
        assert (fleet.info.num_replicas, fleet.info.world_size) == (3, 3)
        running = [asyncio.create_task(consume(fleet, 10 * i, ENDLESS)) for i in range(6)]
        await until(lambda: counts(fleet) == {0: 2, 1: 2, 2: 2})
        assert fleet.num_running == 6
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert await consume(fleet, 5, SamplingParams(max_tokens=7)) == 7
        await until(lambda: fleet.stats is not None and sum(one.num_steps for one in fleet.stats.replicas) > 0)
        assert fleet.stats is not None
        assert len(fleet.stats.replicas) == 3


@pytest.mark.parametrize(
    ("prompts", "num_choices"), [([[1, 2, 3], [11, 12, 13], [21, 22, 23], [31, 32, 33]], 1), ([[1, 2, 3]], 4)]
)
def test_all_outputs_of_one_http_request_are_shared_out(
    checkpoint: Path, prompts: list[list[int]], num_choices: int
) -> None:
    async def run() -> None:
        async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
            generation = Generation(Service(fleet, "tiny"), prompts, ENDLESS, num_choices)
            assert fleet.num_running == 0
            async with aclosing(generation.deltas()) as deltas:
                async for _ in deltas:
                    assert counts(fleet) == {0: 2, 1: 2}
                    break

    asyncio.run(run())


@in_loop
async def test_a_wrong_request_is_refused_before_it_is_picked_for(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        with pytest.raises(RequestError, match="at least one token"):
            fleet.generate([], ENDLESS)
        deltas = fleet.generate([1], ENDLESS)
        for pid in pids(fleet):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: fleet.dead is not None)
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await anext(deltas)


class Reader:
    """Reads a request in a task of its own: of `num_tokens`, or until `end`, and every token once, in order."""

    def __init__(self, fleet: Fleet, first: int, num_tokens: int | None = None) -> None:
        self.prompt = [first, first + 1, first + 2]
        self.num_tokens = num_tokens
        self.tokens: list[int] = []
        self._fleet = fleet
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for delta in self._fleet.generate(self.prompt, SamplingParams(max_tokens=self.num_tokens)):
            self.tokens += delta.token_ids
            assert self.tokens == (self.prompt * len(self.tokens))[: len(self.tokens)]
            assert delta.finish_reason in (None, "length")
        assert len(self.tokens) == self.num_tokens

    async def go_on(self) -> None:
        """Wait for some more tokens."""
        most = len(self.tokens) + 20
        await until(lambda: len(self.tokens) > most or self.task.done())
        assert not self.task.done(), self.task.result()

    async def end(self) -> None:
        await self.go_on()
        self.task.cancel()
        await asyncio.wait((self.task,))
        assert self.task.cancelled()


async def go_on(readers: Sequence[Reader]) -> None:
    await asyncio.gather(*(reader.go_on() for reader in readers))


async def end(readers: Sequence[Reader]) -> None:
    await asyncio.gather(*(reader.end() for reader in readers))


@in_loop
async def test_requests_of_an_engine_that_dies_go_on_in_others(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet_of(checkpoint, "is-paced") as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 4)]
        await go_on(readers)
        assert counts(fleet) == {0: 1, 1: 1, 2: 1}
        os.kill(pids(fleet)[1], signal.SIGKILL)
        await until(lambda: states(fleet)[1] == "dead")
        await end(readers)
        assert fleet.dead is None
        assert states(fleet) == {0: "serving", 1: "dead", 2: "serving"}
        assert re.fullmatch(r"replica 1 has ended, 2 of 3 go on: .* killed by SIGKILL.*", caplog.messages[0])
        for i in range(4):
            assert await consume(fleet, 50 + i, SamplingParams(max_tokens=3)) == 3
        for pid in pids(fleet)[::2]:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: fleet.dead is not None)
        assert str(fleet.dead).count("killed by SIGKILL") == 3
        with pytest.raises(EngineDeadError):
            fleet.generate([1], ENDLESS)


@in_loop
async def test_requests_do_not_wait_for_an_engine_that_is_started_again(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=2, engine_restarts=1) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 4)]
        await go_on(readers)
        victim = pids(fleet)[0]
        fleet._members.engines[0]._comeback._start_again = lambda *_: asyncio.sleep(3600)  # it takes long
        os.kill(victim, signal.SIGKILL)
        await until(lambda: fleet._members.engines[0].down is not None)
        await until(lambda: counts(fleet) == {0: 0, 1: 3})
        await end(readers)
        assert (fleet.dead, fleet.down) == (None, None)


@in_loop
async def test_a_request_that_three_replicas_died_with_ends(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=4) as fleet:
        reader = asyncio.create_task(consume(fleet, 10, ENDLESS))
        for _ in range(3):
            await until(lambda: any(counts(fleet).values()))
            (home,) = [replica for replica, count in counts(fleet).items() if count]
            os.kill(fleet._members.engines[home].condition.pid, signal.SIGKILL)
            await until(lambda home=home: not counts(fleet)[home])  # type: ignore[misc]
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await reader
        assert await consume(fleet, 50, SamplingParams(max_tokens=3)) == 3, "one is left"


@in_loop
async def test_a_replica_that_died_is_replaced(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.roster_work.REPLACE_AFTER_S", 0.0)
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        before = pids(fleet)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: states(fleet)[0] == "dead")
        await until(lambda: states(fleet) == {0: "serving", 1: "serving"})
        assert pids(fleet)[0] != before[0]
        assert pids(fleet)[1] == before[1]
        readers = [Reader(fleet, 10 * i, 100) for i in range(1, 5)]
        await asyncio.gather(*(reader.task for reader in readers))


@in_loop
async def test_one_that_cannot_be_ended_is_replaced_as_well(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("phalanx.engine.roster_work.REPLACE_AFTER_S", 0.0)
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        close = fleet._members.engines[0].close

        async def close_and_fail() -> None:
            await close()
            raise DeadlineError("the end after SIGKILL", "process 7", 10.0)

        monkeypatch.setattr(fleet._members.engines[0], "close", close_and_fail)
        os.kill(pids(fleet)[0], signal.SIGKILL)
        await until(lambda: states(fleet)[0] == "dead")
        await until(lambda: states(fleet) == {0: "serving", 1: "serving"})
        assert "replica 0 did not end" in caplog.text


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.seats.num_cores", lambda: 64)


@pytest.mark.usefixtures("many_cores")
@in_loop
async def test_up_and_down_while_requests_stream(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=1) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 4)]
        await go_on(readers)
        await fleet.resize(data_parallel_size=3)
        assert (fleet.info.num_replicas, fleet.info.world_size) == (3, 3)
        readers += [Reader(fleet, 10 * i) for i in range(4, 8)]
        await go_on(readers)
        assert min(counts(fleet).values()) > 0
        first = pids(fleet)[0]
        await fleet.resize(data_parallel_size=1, leaving=[0, 2], drain_timeout_s=0.0)
        assert states(fleet) == {1: "serving"}
        assert not is_running(first)
        await end(readers)
        await fleet.resize(data_parallel_size=2)
        assert states(fleet) == {0: "serving", 1: "serving"}


@pytest.mark.usefixtures("many_cores")
@in_loop
async def test_a_moved_request_is_computed_before_it_moves(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=2) as fleet:
        reader = Reader(fleet, 10)
        await until(lambda: len(reader.tokens) > 100)
        asked: list[list[int]] = []
        rehearsal = fleet._work._leaving._rehearsal

        def note(prompt: Any) -> RequestStream:
            assert counts(fleet) == {0: 1, 1: 0}, "it still runs where it is"
            asked.append(prompt.tolist())
            stream = rehearsal(prompt)
            assert stream.submit(0).is_rehearsal and stream.submit(0).sampling.max_tokens == 1
            return stream

        monkeypatch.setattr(fleet._work._leaving, "_rehearsal", note)
        await fleet.resize(data_parallel_size=1, leaving=[0], drain_timeout_s=0.0)
        assert len(asked[0]) > 100
        assert len(asked) < MOST_PASSES or len(asked[-1]) > len(asked[0])
        assert asked[-1] == ([10, 11, 12] * len(asked[-1]))[: len(asked[-1])]
        await reader.end()


@pytest.mark.usefixtures("many_cores")
@in_loop
async def test_a_resize_does_not_wait_for_ever_for_what_is_computed_ahead(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.engine.leaving.MOVE_TIMEOUT_S", 0.1)
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=2) as fleet:
        reader = Reader(fleet, 10)
        await go_on([reader])
        leaving = next(number for number, count in counts(fleet).items() if count)
        os.kill(pids(fleet)[1 - leaving], signal.SIGSTOP)
        await fleet.resize(1, leaving=[leaving], drain_timeout_s=0.0)
        assert counts(fleet) == {1 - leaving: 1}
        os.kill(pids(fleet)[0], signal.SIGCONT)
        await go_on([reader])
        await end([reader])


@in_loop
async def test_that_a_leaving_replica_died_is_told_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with fleet_of(checkpoint, "is-paced") as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(3)]
        await go_on(readers)
        resizing = await fleet.begin_resize(1, leaving=[1, 2])
        os.kill(fleet._members.engines[2].condition.pid, signal.SIGKILL)
        await until(lambda: "replica 2 has ended" in caplog.text)
        await go_on(readers)
        await asyncio.sleep(5 * WATCH_POLL_S)
        assert caplog.text.count("replica 2 has ended") == 1
        resizing.cancel()
        await asyncio.wait([resizing])
        await end(readers)


@in_loop
async def test_requests_of_a_leaving_replica_may_end_there(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=2) as fleet:
        readers = [Reader(fleet, 10), Reader(fleet, 20, 700)]
        await go_on(readers)
        assert counts(fleet) == {0: 1, 1: 1}
        leaving = asyncio.create_task(fleet.resize(data_parallel_size=1, leaving=[1], drain_timeout_s=TIMEOUT_S))
        await until(lambda: states(fleet)[1] == "leaving")
        assert await consume(fleet, 50, SamplingParams(max_tokens=3)) == 3
        await leaving
        assert readers[1].task.done()
        await readers[1].task
        await end(readers[:1])


@pytest.mark.usefixtures("many_cores")
@in_loop
async def test_a_resize_that_fails_or_is_cancelled_is_undone(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=1) as fleet:
        reader = Reader(fleet, 10)
        fleet._joining._command = command("dies-at-start")
        with pytest.raises(ResizeError, match=r"replica [12] did not start: .*SIGKILL"):
            await fleet.resize(data_parallel_size=3)
        assert states(fleet) == {0: "serving"}
        fleet._joining._command = command("hangs-at-start")
        growing = await fleet.begin_resize(data_parallel_size=2)
        await until(lambda: fleet.replicas()[1].phase == "loading")
        assert states(fleet) == {0: "serving", 1: "joining"}
        with pytest.raises(ResizeUnderWayError, match="from 1 to 2 replicas"):
            await fleet.resize(data_parallel_size=3)
        growing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await growing
        assert states(fleet) == {0: "serving"}
        fleet._joining._command = command("is-paced")
        await fleet.resize(data_parallel_size=2)
        other = Reader(fleet, 30)
        await until(lambda: counts(fleet)[1] == 1)
        shrinking = await fleet.begin_resize(data_parallel_size=1, leaving=[1])
        await until(lambda: states(fleet)[1] == "leaving")
        shrinking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shrinking
        assert states(fleet) == {0: "serving", 1: "serving"}
        await end([reader, other])


@pytest.mark.usefixtures("many_cores")
@in_loop
async def test_deaths_while_the_size_changes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.roster_work.REPLACE_AFTER_S", 0.0)
    async with fleet_of(checkpoint, "is-paced") as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 4)]
        await go_on(readers)
        shrinking = await fleet.begin_resize(data_parallel_size=1, leaving=[1, 2])
        await until(lambda: states(fleet)[1] == "leaving")
        os.kill(pids(fleet)[1], signal.SIGKILL)  # it has left now
        os.kill(pids(fleet)[0], signal.SIGKILL)  # nobody but replica 2 is there
        with pytest.raises(ResizeError, match="replica 0, which was to stay, died"):
            await shrinking
        await until(lambda: set(states(fleet).values()) == {"serving"})
        assert len(states(fleet)) == 3
        await end(readers)


@in_loop
async def test_who_is_to_leave_serves_on_while_who_is_to_stay_is_started_again(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, "is-paced", data_parallel_size=2, engine_restarts=1) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 4)]
        await go_on(readers)
        fleet._members.engines[0]._comeback._start_again = lambda *_: asyncio.sleep(3600)  # it takes long
        shrinking = await fleet.begin_resize(data_parallel_size=1, leaving=[1], drain_timeout_s=TIMEOUT_S)
        await until(lambda: states(fleet)[1] == "leaving")
        os.kill(pids(fleet)[0], signal.SIGKILL)
        with pytest.raises(ResizeError, match="none of those that were to stay serves now: 0, started again"):
            await shrinking
        await until(lambda: counts(fleet) == {0: 0, 1: 3})
        await end(readers)


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(("seed", "engine_restarts"), [(1, 0), (2, 1000)])
def test_streams_live_through_kills_and_resizes_in_any_order(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, seed: int, engine_restarts: int
) -> None:
    monkeypatch.setattr("phalanx.engine.roster_work.REPLACE_AFTER_S", 0.0)
    dice = random.Random(seed)

    async def read_on(fleet: Fleet, first: int, is_over: asyncio.Event) -> int:
        """One request after the other; how many."""
        count = 0
        while not is_over.is_set():
            await Reader(fleet, first, 400).task
            count += 1
        return count

    async def disturb(fleet: Fleet) -> None:
        resizing: asyncio.Task[None] | None = None
        for _ in range(8):
            await asyncio.sleep(dice.uniform(0.0, 0.3))
            kind = dice.choice(("kill", "resize", "resize", "cancel"))
            serving = [number for number, state in states(fleet).items() if state == "serving"]
            if kind == "kill" and len(serving) > 1:
                with suppress(ProcessLookupError):  # it is dead already
                    os.kill(fleet._members.engines[dice.choice(serving)].condition.pid, signal.SIGKILL)
            elif kind == "cancel" and resizing is not None:
                resizing.cancel()
            elif kind == "resize":
                with suppress(ResizeUnderWayError):
                    resizing = await fleet.begin_resize(dice.randint(1, 4), drain_timeout_s=dice.choice((0.0, 0.1)))
        if resizing is not None:
            await asyncio.wait((resizing,))
            assert resizing.cancelled() or isinstance(resizing.exception(), ResizeError | None)

    async def run() -> None:
        async with fleet_of(checkpoint, data_parallel_size=2, engine_restarts=engine_restarts) as fleet:
            is_over = asyncio.Event()
            readers = [asyncio.create_task(read_on(fleet, 10 * i, is_over)) for i in range(1, 5)]
            await disturb(fleet)
            await until(lambda: set(states(fleet).values()) == {"serving"})
            is_over.set()
            assert min(await asyncio.gather(*readers)) > 0
            assert len(fleet._members.engines) == fleet.info.num_replicas == len(states(fleet))
            assert fleet.num_running == 0
            assert not fleet._traffic.requests

    asyncio.run(run())


@in_loop
async def test_what_has_no_room_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        with pytest.raises(RequestError, match="no such replica; there are 0"):
            await fleet.resize(data_parallel_size=1, leaving=[3])
        with pytest.raises(ConfigError, match="data_parallel_size: 99 is not possible: at most 64"):
            await fleet.resize(data_parallel_size=99)
        monkeypatch.setattr("phalanx.engine.seats.num_cores", lambda: 3)
        with pytest.raises(ConfigError, match="there are 3 cores, too few for 4 ranks"):
            await fleet.resize(data_parallel_size=4)
        monkeypatch.setattr("phalanx.engine.seats.bytes_of_family", lambda pid: 3 << 30)
        monkeypatch.setattr("phalanx.engine.seats.free_host_bytes", lambda: 5 << 30)
        with pytest.raises(ConfigError, match=r"that takes 6.00 GiB more memory, and 5.00 GiB are free"):
            await fleet.resize(data_parallel_size=3)
        await fleet.resize(data_parallel_size=1)
        assert states(fleet) == {0: "serving"}


@in_loop
async def test_replicas_that_share_experts_cannot_come_and_go_one_by_one(checkpoint: Path) -> None:
    """See test_engine_asked_resize.py for what they can."""
    async with asyncio.timeout(TIMEOUT_S):
        config = config_of(checkpoint, enable_expert_parallel=True)
        engine = await EngineClient.start(config, command=command("healthy"))
        try:
            with pytest.raises(RequestError, match="replicas in lockstep are replaced all at once"):
                await engine.resize(data_parallel_size=2, leaving=[0])
        finally:
            await engine.close()


@in_loop
async def test_closed_during_a_resize_it_leaves_nothing(checkpoint: Path, many_cores: None) -> None:
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        fleet._joining._command = command("hangs-at-start")
        growing = await fleet.begin_resize(data_parallel_size=2)
        await until(lambda: fleet.replicas()[1].phase == "loading")
        await fleet.close()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await growing


@in_loop
async def test_what_is_ordered_while_it_closes_is_left_undone(
    checkpoint: Path, many_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would wait for it."""
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        fleet._joining._command = command("hangs-at-start")
        growing = await fleet.begin_resize(data_parallel_size=2)
        await until(lambda: fleet.replicas()[1].phase == "loading")
        carried_out: list[Order] = []
        do = fleet._work._do

        def note(order: Order, before: Any) -> Any:
            carried_out.append(order)
            return do(order, before)

        monkeypatch.setattr(fleet._work, "_do", note)
        growing.cancel()  # which ends replica 1
        await fleet.close()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await growing
        assert not carried_out and all(task.done() for task in fleet._work._tasks.values())


@in_loop
async def test_one_that_does_not_start_leaves_none(checkpoint: Path) -> None:
    told: list[StartProgress] = []
    config = config_of(checkpoint, tensor_parallel_size=2)
    with pytest.raises(StartError):
        await Fleet.start(config, told.append, command=command("dies-at-start"))
    assert {progress.rank for progress in told} <= {0, 2, 4}, "the first rank of each replica reports"


@in_loop
async def test_only_replicas_that_share_experts_are_no_fleet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, Config]] = []

    async def start(config: Config, on_progress: Any) -> Any:
        started.append(("engine", config))

    async def start_fleet(config: Config, on_progress: Any) -> Any:
        started.append(("fleet", config))

    monkeypatch.setattr(EngineClient, "start", start)
    monkeypatch.setattr(Fleet, "start", start_fleet)
    for settings in ({"data_parallel_size": 1}, {"enable_expert_parallel": True}, {}):
        await start_engine(config_of(checkpoint, **settings))
    assert [kind for kind, _ in started] == ["fleet", "engine", "fleet"]


def test_replicas_share_out_the_cores(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.seats.num_cores", lambda: 12)
    for own, environment in settings_of_replicas(config_of(checkpoint, tensor_parallel_size=2, device="cpu")):
        assert own.parallel.world_size == 2
        assert own.executor.threads_per_rank == 2
        assert environment == {}


def test_replicas_share_out_the_gpus(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-a,3,1,0,2")
    monkeypatch.setattr(platform, "torch_has_cuda", lambda: True)
    settings = settings_of_replicas(config_of(checkpoint, tensor_parallel_size=2))
    assert [own.executor.device for own, _ in settings] == ["cuda"] * 3
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in settings] == ["7,5", "GPU-a,3", "1,0"]


def test_a_replica_that_joins_gets_gpus_that_nobody_has(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-a,3,1")
    monkeypatch.setattr(platform, "torch_has_cuda", lambda: True)
    places = Seats(config_of(checkpoint, data_parallel_size=1, tensor_parallel_size=2))
    own, environment = places.settings(1, 2, max_model_len=500)
    assert environment == {"CUDA_VISIBLE_DEVICES": "GPU-a,3"}
    assert (own.parallel.data_parallel_size, own.parallel.tensor_parallel_size) == (1, 2)
    assert (own.executor.device, own.model.max_model_len) == ("cuda", 500)
    assert places.settings(0, 2, max_model_len=500)[1] == {"CUDA_VISIBLE_DEVICES": "7,5"}
    places.check_host(2, [1], [])
    with pytest.raises(ConfigError, match="data_parallel_size: 3 is not possible: 6 GPUs are needed and 5 can be used"):
        places.check_host(3, [1, 2], [])


def test_memory_that_replicas_share_is_needed_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "bytes_of_family", {1: 900 << 20, 2: 600 << 20}.get)
    monkeypatch.setattr(seats, "free_host_bytes", lambda: 1000 << 20)
    monkeypatch.setattr(seats, "num_cores", lambda: 8)
    places = Seats(config_of(checkpoint, device="cpu", data_parallel_size=1))
    places.check_host(2, [1], [1], 0)
    places.check_host(3, [1, 2], [1], 400 << 20)  # 500 MiB each: the weights are there
    with pytest.raises(ConfigError, match=re.escape("takes 1.37 GiB more memory, and 0.98 GiB are free")):
        places.check_host(4, [2, 3], [1, 2], 400 << 20)  # of the largest, half of them


def test_a_placement_group_of_the_users_is_for_one_replica(checkpoint: Path) -> None:
    one_group = Seats(config_of(checkpoint, launcher="ray", data_parallel_size=1, placement_group="mine"))
    with pytest.raises(ConfigError, match="placement_group: 'mine' is not possible"):
        one_group.check_size(2)


def test_with_ray_each_replica_knows_whether_it_is_local(checkpoint: Path) -> None:
    config = config_of(checkpoint, launcher="ray", data_parallel_size_local=2)
    locals_ = [own.parallel.data_parallel_size_local for own, _ in settings_of_replicas(config)]
    assert locals_ == [1, 1, 0]
    undecided = config_of(checkpoint, launcher="ray")
    assert {own.parallel.data_parallel_size_local for own, _ in settings_of_replicas(undecided)} == {None}


@pytest.mark.parametrize(
    ("visible", "settings", "shares"),
    [
        ("4,5,6", {}, ["4", "5", "6"]),
        ("4,5", {}, ["", "", ""]),
        ("4,5", {"ray_per_worker_gpus": 0.5}, ["4", "5", "4"]),
        ("4,5,6,7,0,1", {"ray_per_worker_gpus": 1.5}, ["4,5", "6,7", "0,1"]),
    ],
)
def test_a_ray_of_its_own_has_gpus_of_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, visible: str, settings: dict[str, Any], shares: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config = config_of(checkpoint, launcher="ray", **settings)
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in settings_of_replicas(config)] == shares


@in_loop
async def test_with_ray_one_replica_is_placed_after_the_other(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that chose at the same time would choose the same room."""
    events: list[str] = []

    async def start(config: Config, on_progress: Any, **_: Any) -> Any:
        replica = sum(event == "begins" for event in events)
        events.append("begins")
        for rank in range(2):
            on_progress(StartProgress(rank, "placing"))
        await asyncio.sleep(0.02)
        events.append("is placed")
        on_progress(StartProgress(1, "starting", node="alpha"))
        await asyncio.sleep(0.1)
        if replica == 1:
            raise StartError("rank 1", "loading", "it could not")
        await asyncio.sleep(5)

    monkeypatch.setattr(EngineClient, "start", start)
    told: list[StartProgress] = []
    with pytest.raises(StartError):
        await Fleet.start(config_of(checkpoint, launcher="ray", tensor_parallel_size=2), told.append)
    assert events == ["begins", "is placed"] * 3
    assert [progress.rank for progress in told if progress.node] == [1, 3, 5]


@in_loop
async def test_ranks_of_one_replica_share_every_layer_among_more_of_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.engine.seats.num_cores", lambda: 3)
    async with fleet_of(checkpoint, data_parallel_size=1, threads_per_rank=1) as fleet:
        reshaping = await fleet.begin_resize(tensor_parallel_size=NEVER_READY)
        for asked in ({"data_parallel_size": 2}, {"tensor_parallel_size": 2}):
            with pytest.raises(ResizeUnderWayError, match="tensor_parallel_size 1 to another"):
                await fleet.begin_resize(**asked)
        reshaping.cancel()
        await asyncio.wait([reshaping])
        assert reshaping.cancelled() and fleet.info.tensor_parallel_size == 1
        await fleet.resize(tensor_parallel_size=2)
        assert (fleet.info.tensor_parallel_size, fleet.info.world_size) == (2, 2)
        with pytest.raises(ConfigError, match="too few for 4 ranks"):
            await fleet.resize(2)
        await fleet.resize(1, tensor_parallel_size=1)
        await fleet.resize(2)
        assert fleet.info.num_replicas == 2
        for size in (None, 1):
            with pytest.raises(ConfigError, match="only one replica can change it, and there are 2"):
                await fleet.resize(size, tensor_parallel_size=2)


@in_loop
async def test_a_replica_that_joins_gets_the_weights_of_one_that_serves(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        (first,) = pids(fleet)
        await fleet.resize(2)
        shared = decode_shared(await fleet._members.engines[1].share_weights())
        assert shared.kind.versions == (str(pids(fleet)[1]), str(first)), "its own, which it had from the first"


@in_loop
async def test_an_engine_that_is_started_again_gets_the_weights_of_another(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2, engine_restarts=1) as fleet:
        first, second = pids(fleet)
        os.kill(second, signal.SIGKILL)
        await until(lambda: fleet.conditions()[1].num_restarts == 1)
        shared = decode_shared(await fleet._members.engines[1].share_weights())
        assert shared.kind.versions == (str(pids(fleet)[1]), str(first)), "its own, which it had from the first"


@in_loop
async def test_other_weights_are_nobodys(checkpoint: Path) -> None:
    """Those of another version, or of an engine that has not answered, sleeps, or has ended."""
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        joining, engine = fleet._joining, fleet._members.engines[0]
        assert await joining.find_weights() and not await joining.find_weights(0)
        joining.weights_version += 1
        assert not await joining.find_weights()
        joining.weights_version -= 1
        await fleet.maintain(Sleep(1))
        assert not await joining.find_weights()
        await fleet.maintain(Wake(None))
        os.kill(engine.condition.pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.share_weights())
        await asyncio.sleep(0)
        os.kill(engine.condition.pid, signal.SIGKILL)
        assert not await asked
        assert engine.dead is not None and not await engine.share_weights()


def fails_once(monkeypatch: pytest.MonkeyPatch, engine: EngineClient) -> None:
    """The next order to it."""
    maintain = engine.maintain

    async def fail(*_: object, **__: object) -> None:
        monkeypatch.setattr(engine, "maintain", maintain)
        raise MaintenanceError("its ranks were killed")

    monkeypatch.setattr(engine, "maintain", fail)


@in_loop
async def test_a_sleep_or_wake_that_fails_in_one_is_undone_in_the_others(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        for order, level in ((Sleep(1), 0), (Sleep(2), 0), (Sleep(1), None), (Wake(None), 1), (Sleep(2), 1)):
            if level is None:
                await fleet.maintain(order)
                continue
            fails_once(monkeypatch, engines[1])
            with pytest.raises(MaintenanceError, match="its ranks were killed"):
                await fleet.maintain(order)
            assert [engine.asleep for engine in engines.values()] == [level, level], order
        for _ in range(2):
            await fleet.maintain(Wake(None))  # the second one finds all awake
        assert await consume(fleet, 5, SamplingParams(max_tokens=7)) == 7


@pytest.mark.parametrize("is_other", [True, False])
@in_loop
async def test_after_a_wake_with_other_weights_that_was_undone_all_get_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, is_other: bool
) -> None:
    """Whether they are asked for again, or not."""
    other = "/other"
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines, asked = fleet._members.engines, []

        async def maintain(self: EngineClient, order: MaintenanceOrder, *, weights_version: int | None = None) -> None:
            """As engines do, whose files are all there."""
            if isinstance(order, Wake) and self is engines[1] and len(asked) == 1:
                asked.append(order.model)
                raise MaintenanceError("its ranks were killed")
            if isinstance(order, Wake):
                asked.append(order.model)
                new = order.model if order.model is not None else models[self]
                if new != models[self]:
                    models[self], versions[self] = new, weights_version
            levels[self] = order.level if isinstance(order, Sleep) else 0

        models: dict[EngineClient, str] = dict.fromkeys(engines.values(), str(checkpoint))
        versions: dict[EngineClient, int | None] = dict.fromkeys(engines.values(), 1)
        levels = dict.fromkeys(engines.values(), 0)
        monkeypatch.setattr(EngineClient, "maintain", maintain)
        monkeypatch.setattr(EngineClient, "checkpoint", property(models.get), raising=False)
        monkeypatch.setattr(EngineClient, "weights_version", property(versions.get))
        monkeypatch.setattr(EngineClient, "asleep", property(levels.get))
        monkeypatch.setattr(Joining, "may_share_weights", False)
        await fleet.maintain(Sleep(2))
        with pytest.raises(MaintenanceError):
            await fleet.maintain(Wake(other))
        assert list(levels.values()) == [2, 2] and list(versions.values()) == [2, 1]
        await fleet.maintain(Wake(other if is_other else None))
        assert list(levels.values()) == [0, 0]
        assert [*models.values()] == [other if is_other else str(checkpoint)] * 2
        assert [*versions.values()] == [2 if is_other else 1] * 2


@in_loop
async def test_weights_are_the_same_whatever_they_are_called(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A link that was given at the start is the directory that weights are taken back to; nobody is told otherwise."""
    link, other = tmp_path / "current", tmp_path / "other"
    link.symlink_to(checkpoint)
    shutil.copytree(checkpoint, other)
    async with fleet_of(link, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        fails_once(monkeypatch, engines[1])
        with pytest.raises(MaintenanceError, match="its ranks were killed"):
            await fleet.maintain(Reload(str(other), "now", 5.0))
        assert [engine.weights_version for engine in engines.values()] == [1, 1]
        await fleet.maintain(Sleep(2))
        fails_once(monkeypatch, engines[1])
        with pytest.raises(MaintenanceError, match="its ranks were killed"):
            await fleet.maintain(Wake(str(other)))
        await fleet.maintain(Wake(None))
        assert {engine.checkpoint for engine in engines.values()} == {str(checkpoint.resolve())}
        assert await engines[0].share_weights() and await fleet._joining.find_weights()


@pytest.mark.parametrize("is_back", [True, False])
@in_loop
async def test_the_same_weights_have_one_version_after_a_wake_that_was_undone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_back: bool
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    link.symlink_to(checkpoint if is_back else other)
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        monkeypatch.setattr(Joining, "may_share_weights", False)
        await fleet.maintain(Sleep(2))
        fails_once(monkeypatch, engines[1])
        with pytest.raises(MaintenanceError):
            await fleet.maintain(Wake(str(other)))
        assert [engine.weights_version for engine in engines.values()] == [2, 1]
        await fleet.maintain(Wake(str(link)))
        assert len({(engine.checkpoint, engine.weights_version, engine.asleep) for engine in engines.values()}) == 1


@in_loop
async def test_who_has_woken_with_other_weights_says_their_version(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also if it could not be put to sleep again when another one failed."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        monkeypatch.setattr(Joining, "may_share_weights", False)
        await fleet.maintain(Sleep(2))
        fails_once(monkeypatch, engines[1])
        maintain = engines[0].maintain

        async def stays_awake(order: MaintenanceOrder, **given: Any) -> None:
            if isinstance(order, Sleep):
                raise MaintenanceError("no")
            await maintain(order, **given)

        monkeypatch.setattr(engines[0], "maintain", stays_awake)
        with pytest.raises(MaintenanceError, match="replica 0 is awake"):
            await fleet.maintain(Wake(str(other)))
        monkeypatch.setattr(engines[0], "maintain", maintain)
        await fleet.maintain(Wake(str(other)))
        assert [(engine.checkpoint, engine.weights_version) for engine in engines.values()] == [(str(other), 2)] * 2


@in_loop
async def test_a_replica_that_finds_other_weights_does_not_join(checkpoint: Path, tmp_path: Path) -> None:
    """Where a link names others by now that was given at the start: a sleep is none of that."""
    link, other = tmp_path / "current", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    link.symlink_to(checkpoint)
    async with fleet_of(link, data_parallel_size=1) as fleet:
        link.unlink()
        link.symlink_to(other)
        with pytest.raises(StartError, match=r"replica 1 did not start: its weights are of .*other"):
            await fleet._joining.start(1, 2, sleep_level=lambda: 0)
        await fleet.maintain(Sleep(1))
        await fleet.maintain(Wake(None))


@in_loop
async def test_who_is_awake_gets_no_other_weights_by_a_wake_of_others(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        await engines[1].maintain(Sleep(2))
        with pytest.raises(NotNowError, match=r"replica 0 is awake, with weights of .*: wake the others, then reload"):
            await fleet.maintain(Wake(str(other)))
        assert [engine.asleep for engine in engines.values()] == [0, 2]
        await fleet.maintain(Wake(str(checkpoint)))
        assert [engine.asleep for engine in engines.values()] == [0, 0]


@in_loop
async def test_what_cannot_be_undone_is_told_and_no_request_goes_to_who_sleeps(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        engines = fleet._members.engines
        fails_once(monkeypatch, engines[1])
        maintain = engines[0].maintain

        async def falls_asleep_for_good(order: MaintenanceOrder, **given: Any) -> None:
            if isinstance(order, Wake):
                raise MaintenanceError("no memory is left")
            await maintain(order, **given)

        monkeypatch.setattr(engines[0], "maintain", falls_asleep_for_good)
        with pytest.raises(MaintenanceError, match="replica 0 is asleep \\(no memory is left\\): ask again"):
            await fleet.maintain(Sleep(1))
        assert [await consume(fleet, 10 * i, SamplingParams(max_tokens=3)) for i in range(4)] == [3] * 4


@in_loop
async def test_nobody_joins_while_others_get_weights_and_the_other_way_round(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        joining = fleet._joining
        joining.starting.add(1)
        with pytest.raises(NotNowError, match="replicas are being started again: 1"):
            await fleet.maintain(Sleep(1))
        joining.starting.clear()
        joining.order = asyncio.create_task(asyncio.sleep(TIMEOUT_S))
        starting = asyncio.create_task(joining.start(1, 2, sleep_level=lambda: 1))
        await asyncio.sleep(0.1)
        assert not joining.starting
        joining.order.cancel()
        engine = await starting
        assert engine.asleep == 1, "as the others are by then"
        await engine.close()


@in_loop
async def test_no_order_comes_while_one_that_joins_looks_for_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of before would be in it, beside the others' new ones."""
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        joining, found = fleet._joining, asyncio.Event()

        async def find(number: int | None = None) -> bytes:
            await found.wait()
            return b""

        monkeypatch.setattr(joining, "find_weights", find)
        starting = asyncio.create_task(joining.start(1, 2, sleep_level=lambda: 0))
        await asyncio.sleep(0)
        with pytest.raises(NotNowError, match="replicas are being started again: 1"):
            await fleet.maintain(Reload(None, "now", 5.0))
        found.set()
        await (await starting).close()


@in_loop
async def test_weights_that_nobody_has_taken_use_up_no_version(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        fails_once(monkeypatch, fleet._members.engines[0])
        with pytest.raises(MaintenanceError):
            await fleet.maintain(Reload(None, "now", 5.0))
        assert fleet._maintenance._next_version(fleet._members.engines) == 2


@in_loop
async def test_no_node_is_drained_if_an_order_has_come_meanwhile(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While growth gave way."""
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        may_go_on = asyncio.Event()
        monkeypatch.setattr(fleet._growth, "give_way", may_go_on.wait)
        draining = asyncio.create_task(fleet.begin_drain("alpha"))
        await asyncio.sleep(0)
        await fleet.maintain(Sleep(1))
        may_go_on.set()
        with pytest.raises(ResizeRefusedError, match="asleep"):
            await draining


@in_loop
async def test_of_two_other_shapes_at_once_one_is_refused_and_the_other_stays_under_way(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if both have waited for growth to give way."""
    async with fleet_of(checkpoint, data_parallel_size=1) as fleet:
        may_go_on, is_over = asyncio.Event(), asyncio.Event()

        async def reshaped(**_: object) -> asyncio.Task[Any]:
            return asyncio.create_task(is_over.wait())

        monkeypatch.setattr(fleet._growth, "give_way", may_go_on.wait)
        monkeypatch.setattr(fleet._members.engines[0], "begin_resize", reshaped)
        both = [asyncio.create_task(fleet.begin_resize(tensor_parallel_size=size)) for size in (2, 4)]
        await asyncio.sleep(0)
        may_go_on.set()
        first = await both[0]
        with pytest.raises(ResizeUnderWayError):
            await both[1]
        assert fleet._is_reshaping
        is_over.set()
        await first
        assert not fleet._is_reshaping
