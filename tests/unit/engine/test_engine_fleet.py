"""Several engines as one: requests are shared out, and what one engine suffers is not the others'."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import engine_tiny_tokenizers as tiny
import pytest
from test_engine_client import ENDLESS, TIMEOUT_S, command, in_loop, until

from phalanx.config import Config
from phalanx.engine.client import EngineClient
from phalanx.engine.fleet import Fleet, settings_of_replicas, start_engine
from phalanx.errors import EngineDeadError, RequestError, StartError
from phalanx.executor import platform
from phalanx.protocol import SamplingParams, StartProgress
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
    return [engine.condition.pid for engine in fleet._engines]


async def consume(fleet: Fleet, first: int, sampling: SamplingParams) -> int:
    """The number of tokens that come."""
    deltas = [delta async for delta in fleet.generate([first, first + 1, first + 2], sampling)]
    return sum(len(delta.token_ids) for delta in deltas)


@in_loop
async def test_requests_are_shared_out_and_counted_by_replica(checkpoint: Path) -> None:
    async with fleet_of(checkpoint) as fleet:
        assert (fleet.info.num_replicas, fleet.info.world_size) == (3, 3)
        running = [asyncio.create_task(consume(fleet, 10 * i, ENDLESS)) for i in range(6)]
        await until(lambda: [engine.num_running for engine in fleet._engines] == [2, 2, 2])
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
                    assert [engine.num_running for engine in fleet._engines] == [2, 2]
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


@in_loop
async def test_an_engine_that_dies_takes_its_own_requests_along(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet_of(checkpoint) as fleet:
        running = [asyncio.create_task(consume(fleet, 10 * i, ENDLESS)) for i in range(3)]
        await until(lambda: fleet.num_running == 3)
        os.kill(pids(fleet)[1], signal.SIGKILL)
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        (failed,) = [task for task in running if task.done()]
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            failed.result()
        assert fleet.dead is None
        await until(lambda: bool(caplog.messages))
        assert re.fullmatch(r"replica \d has ended, 2 of 3 go on: .* killed by SIGKILL.*", caplog.messages[0])
        for i in range(4):
            assert await consume(fleet, 50 + i, SamplingParams(max_tokens=3)) == 3
        for pid in pids(fleet)[::2]:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: fleet.dead is not None)
        assert str(fleet.dead).count("killed by SIGKILL") == 3
        with pytest.raises(EngineDeadError):
            fleet.generate([1], ENDLESS)
        await asyncio.gather(*running, return_exceptions=True)


@in_loop
async def test_one_that_does_not_start_leaves_none(checkpoint: Path) -> None:
    told: list[StartProgress] = []
    config = config_of(checkpoint, tensor_parallel_size=2)
    with pytest.raises(StartError):
        await Fleet.start(config, told.append, command=command("dies-at-start"))
    assert {progress.rank for progress in told} <= {0, 2, 4}, "the first rank of each replica reports"


@in_loop
async def test_one_replica_needs_no_fleet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, Config]] = []

    async def start(config: Config, on_progress: Any) -> Any:
        started.append(("engine", config))

    async def start_fleet(config: Config, on_progress: Any) -> Any:
        started.append(("fleet", config))

    monkeypatch.setattr(EngineClient, "start", start)
    monkeypatch.setattr(Fleet, "start", start_fleet)
    for settings in ({"data_parallel_size": 1}, {"enable_expert_parallel": True}, {}):
        await start_engine(config_of(checkpoint, **settings))
    assert [kind for kind, _ in started] == ["engine", "engine", "fleet"]


def test_replicas_share_out_the_cores(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.fleet.num_cores", lambda: 12)
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
