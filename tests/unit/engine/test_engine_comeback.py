"""An engine that ends before its time is started again, and nobody but the clock can tell."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_fake_process
import engine_tiny_tokenizers as tiny
import httpx
import pytest
from test_engine_client import ENDLESS, TIMEOUT_S, client_of, in_loop, short_grace, text_of, until
from test_engine_fleet import consume, fleet_of, pids

from phalanx.engine.client import EngineClient
from phalanx.engine.comeback import Comeback
from phalanx.errors import EngineDeadError, PhalanxError, PlacementError, StartError
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.api_keys import ApiKeys
from phalanx.server.app import create_app
from phalanx.server.service import Service
from phalanx.transport.liveness import is_running

__all__ = ["short_grace"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text('{"vocab_size": 400}')
    return tiny.save(tiny.byte_level(), directory)


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.restarts.FIRST_DELAY_S", 0.01)


def kill(client: EngineClient) -> None:
    os.kill(client.condition.pid, signal.SIGKILL)


async def until_up_again(client: EngineClient, num_restarts: int) -> None:
    await until(lambda: client.condition.num_restarts == num_restarts)
    assert (client.down, client.dead) == (None, None)


@in_loop
async def test_streams_go_on_and_nobody_is_sent_a_token_twice(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(checkpoint, engine_restarts=3) as client:
        first_pid = client.condition.pid

        async def one(number: int) -> None:
            text = f"füchse 🦊 {number} "
            ids = client.tokenizer.encode(text)
            sampling = SamplingParams(max_tokens=200 * len(ids))
            deltas = [delta async for delta in client.generate(ids, sampling)]
            assert "".join(delta.text for delta in deltas) == 200 * text
            assert [token_id for delta in deltas for token_id in delta.token_ids] == 200 * ids
            assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]

        running = [asyncio.create_task(one(number)) for number in range(20)]
        for num_restarts in (1, 2):
            await until(lambda: client.num_running == 20)
            await asyncio.sleep(random.uniform(0.0, 0.05))
            kill(client)
            await until(lambda: client.down is not None)
            assert "killed by SIGKILL" in str(client.down)
            await until_up_again(client, num_restarts)
        await asyncio.gather(*running)
        assert client.condition.pid != first_pid and client.num_running == 0
    assert not is_running(first_pid)
    told = "it is started again (1 of 3 within 600 s), requests that wait for it: 20"
    assert "killed by SIGKILL" in caplog.messages[0] and caplog.messages[0].endswith(told)
    assert "the engine serves again after" in caplog.messages[1]


@pytest.mark.parametrize("step", [2, 3, 6])
@in_loop
async def test_a_stop_string_and_a_character_that_begin_before_the_end(
    checkpoint: Path, tmp_path: Path, step: int
) -> None:
    """The engine ends with the tokens of this step; the next one makes the rest."""
    behaviour = f"{tmp_path / 'starts'}:dies-in-step-{step},healthy"
    async with client_of(checkpoint, behaviour, engine_restarts=1) as client:
        prompt = client.tokenizer.encode("🦊 STOP now")
        sampling = SamplingParams(max_tokens=None, stop=("STOP",))
        deltas = [delta async for delta in client.generate(prompt, sampling)]
        assert "".join(delta.text for delta in deltas) == "🦊 "
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "STOP")
        tokens = [token_id for delta in deltas for token_id in delta.token_ids]
        assert tokens == prompt[: len(tokens)]


@pytest.mark.parametrize("behaviour", ["dies-when-asked", "fails-in-step-5", "dies-in-step-1"])
@in_loop
async def test_however_it_ends(checkpoint: Path, tmp_path: Path, behaviour: str) -> None:
    async with client_of(checkpoint, f"{tmp_path / 'starts'}:{behaviour},healthy", engine_restarts=1) as client:
        outputs = await asyncio.gather(*(text_of(client, "the fox", SamplingParams(max_tokens=30)) for _ in range(5)))
        assert len({text for text, _ in outputs}) == 1
        assert client.condition.num_restarts == 1


@in_loop
async def test_a_silent_engine_is_killed_and_started_again(checkpoint: Path, tmp_path: Path, short_grace: None) -> None:
    behaviour = f"{tmp_path / 'starts'}:stops-in-step-5,healthy"
    async with client_of(checkpoint, behaviour, engine_restarts=1, step_timeout_s=0.5) as client:
        pid = client.condition.pid
        prompt = client.tokenizer.encode("the fox")
        text, _ = await text_of(client, "the fox", SamplingParams(max_tokens=5 * len(prompt)))
        assert text == 5 * "the fox"
        assert client.condition.num_restarts == 1 and not is_running(pid)


@in_loop
async def test_counts_go_on(checkpoint: Path) -> None:
    async with client_of(checkpoint, engine_restarts=1) as client:
        await text_of(client, "fox", SamplingParams(max_tokens=10))
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_steps == 10)
        kill(client)
        await until(lambda: client.down is not None)
        assert client.stats is not None and client.stats.replicas[0].num_running == 0
        await until_up_again(client, 1)
        await text_of(client, "fox", SamplingParams(max_tokens=10))
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_steps == 20)


@in_loop
async def test_a_node_is_not_left_before_each_new_engine_has_said_so(checkpoint: Path) -> None:
    async with client_of(checkpoint, engine_restarts=1, launcher="ray") as client:
        await until(lambda: client._incarnation.stats is not None)
        assert not client.has_left("beta")
        client.avoid(("beta",))
        await until(lambda: client.has_left("beta"))
        kill(client)
        await until(lambda: client.down is not None)
        assert not client.has_left("beta"), "the next one may just be on its way there"
        await until(lambda: client.has_left("beta"))
        assert client.condition.num_restarts == 1


@in_loop
async def test_what_is_no_longer_wanted_is_not_asked_for_again(checkpoint: Path) -> None:
    async with client_of(checkpoint, engine_restarts=1) as client:
        async with aclosing(client.generate(client.tokenizer.encode("fox"), ENDLESS)) as deltas:
            await anext(deltas)
            kill(client)
            await until(lambda: client.down is not None)
        assert client.num_running == 0
        await until_up_again(client, 1)
        await until(lambda: client._incarnation.stats is not None)
        assert client.stats is not None and client.stats.replicas[0].num_running == 0


@in_loop
async def test_after_so_many_restarts_it_is_the_end(checkpoint: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    async with client_of(checkpoint, f"{starts}:dies-in-step-5,dies-at-start", engine_restarts=3) as client:
        with pytest.raises(EngineDeadError, match=r"killed by SIGKILL.*it was started again 3 times within 600 s"):
            await text_of(client, "fox", ENDLESS)
        assert client.dead is not None and client.down is None
        assert len(starts.read_bytes()) == 4
        with pytest.raises(EngineDeadError):
            client.generate([1], ENDLESS)


@in_loop
async def test_the_users_mistake_at_the_first_start_is_no_restart(checkpoint: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    with pytest.raises(Exception, match="block_size"):
        async with client_of(checkpoint, f"{starts}:wrong-setting", engine_restarts=3):
            pass
    assert len(starts.read_bytes()) == 1


@in_loop
async def test_closing_during_a_restart_leaves_no_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_of(checkpoint, f"{tmp_path / 'starts'}:healthy,hangs-at-start", engine_restarts=1) as client:
        running = asyncio.create_task(text_of(client, "fox", ENDLESS))
        await until(lambda: client.num_running == 1)
        kill(client)
        await until(lambda: client.condition.phase is not None)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        began_at = time.monotonic()
        await client.close()
        assert time.monotonic() - began_at < 5.0
        assert (await running)[1].finish_reason == "cancelled"
        assert children and not any(is_running(int(pid)) for pid in children)


@pytest.mark.parametrize("num_others", [0, 3])
@in_loop
async def test_a_request_that_takes_engines_down_ends_and_the_others_live(checkpoint: Path, num_others: int) -> None:
    async with client_of(checkpoint, "dies-of-a-poison", engine_restarts=3) as client:
        prompt = client.tokenizer.encode("the fox")
        others = [
            asyncio.create_task(text_of(client, "the fox", SamplingParams(max_tokens=300 * len(prompt))))
            for _ in range(num_others)
        ]
        await until(lambda: client.num_running == num_others)
        deltas = [delta async for delta in client.generate([engine_fake_process.POISON, 1], ENDLESS)]
        assert [delta.finish_reason for delta in deltas] == ["error"]
        assert "has ended 3 times in a row while it had this request" in str(deltas[0].error)
        for text, last in await asyncio.gather(*others):
            assert (text, last.finish_reason) == (300 * "the fox", "length")
        await until_up_again(client, 3)


@in_loop
async def test_kills_from_outside_are_nobodys_doing(checkpoint: Path, tmp_path: Path) -> None:
    """Not even of the only request, which gets no further meanwhile."""
    async with client_of(checkpoint, f"when-asked-waits-for {tmp_path / 'file'}", engine_restarts=4) as client:
        reading = asyncio.create_task(text_of(client, "the fox", SamplingParams(max_tokens=4)))
        await until(lambda: client.num_running == 1)
        for num_restarts in range(1, 5):
            kill(client)
            await until_up_again(client, num_restarts)
        (tmp_path / "file").touch()
        _, last = await reading
        assert last.finish_reason == "length"


NO_ROOM = PlacementError("there is room for 1", "a table")


@pytest.mark.parametrize(
    ("failures", "lack"),
    [
        ([NO_ROOM], None),
        ([NO_ROOM, NO_ROOM], "there is room for 1"),
        ([NO_ROOM, NO_ROOM, StartError("rank 1", "loading", "it ended")], None),
        ([NO_ROOM, StartError("rank 1", "loading", "it ended"), NO_ROOM], None),
    ],
)
@in_loop
async def test_room_is_looked_for_twice_before_it_is_said_to_be_missing(
    failures: list[PhalanxError], lack: str | None
) -> None:
    """Whoever hears of it gives the replica up, and what it had may just not be free again."""
    told: list[str | None] = []
    succeeded: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    incarnation: Any = SimpleNamespace(end=nothing, until_ranks_are_gone=nothing)

    async def start_again(_: object) -> Any:
        told.append(comeback.lacks_room)
        if len(told) > len(failures):
            return incarnation
        raise failures[len(told) - 1]

    comeback = Comeback(
        len(failures) + 1,
        start_again,
        succeed=succeeded.set_result,
        give_up=succeeded.set_result,
        num_waiting=lambda: 0,
    )
    comeback.begin(incarnation, "it was killed")
    async with asyncio.timeout(TIMEOUT_S):
        assert await succeeded is incarnation
    assert (told[-1], comeback.lacks_room) == (lack, None)


async def nothing() -> None:
    """It has ended already."""


# ------------------------------------------------------------------------------------- behind a server


@in_loop
async def test_a_server_says_so_and_new_requests_wait(checkpoint: Path, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    async with client_of(checkpoint, f"{tmp_path / 'starts'}:healthy,waits-for {hold}", engine_restarts=1) as client:
        service = Service(client, "m")
        app = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service, ApiKeys(()))), base_url="http://m")
        asked: dict[str, Any] = {"prompt": "fox ", "max_tokens": 8}
        running = asyncio.create_task(app.post("/v1/completions", json={**asked, "max_tokens": 3000}))
        await until(lambda: client.num_running == 1)
        kill(client)
        await until(lambda: client.condition.phase is not None)
        health = await app.get("/health")
        assert health.status_code == 503
        told = health.json()
        assert (told["status"], told["phase"], told["error"]["code"]) == ("restarting", "loading", "engine_restarting")
        assert "killed by SIGKILL" in told["error"]["message"]
        metrics = (await app.get("/metrics")).text
        assert "phalanx_engine_up 0.0" in metrics and 'phalanx_engine_healthy{engine="0"} 0.0' in metrics
        assert "is being started again (loading)" in (await app.get("/status")).text
        waiting = [
            asyncio.create_task(app.post("/v1/completions", json=asked)),
            asyncio.create_task(app.post("/v1/completions", json={**asked, "stream": True})),
        ]
        await until(lambda: service.num_waiting == 2)
        hold.touch()
        for answer in await asyncio.gather(*waiting):
            assert answer.status_code == 200 and "error" not in answer.text
        answer = (await running).json()
        prompt = client.tokenizer.encode("fox ")
        assert answer["choices"][0]["text"] == client.tokenizer.decode((3000 * prompt)[:3000])
        assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["usage"]["completion_tokens"] == 3000
        assert (await app.get("/health")).json() == {"status": "ok"}
        metrics = (await app.get("/metrics")).text
        assert "phalanx_engine_up 1.0" in metrics and 'phalanx_engine_restarts_total{engine="0"} 1.0' in metrics


@in_loop
async def test_each_engine_of_a_fleet_comes_back_by_itself(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, engine_restarts=1, data_parallel_size=2) as fleet:
        running = [asyncio.create_task(consume(fleet, 10 * i, SamplingParams(max_tokens=3000))) for i in range(2)]
        await until(lambda: [engine.num_running for engine in fleet._members.engines.values()] == [1, 1])
        before = pids(fleet)
        os.kill(before[1], signal.SIGKILL)
        await until(lambda: fleet.conditions()[1].down is not None)
        assert (fleet.down, fleet.dead) == (None, None)
        assert await consume(fleet, 5, SamplingParams(max_tokens=3)) == 3
        assert await asyncio.gather(*running) == [3000, 3000]
        await until(lambda: fleet.conditions()[1].num_restarts == 1)
        assert pids(fleet)[0] == before[0] and pids(fleet)[1] != before[1]
        os.kill(pids(fleet)[0], signal.SIGKILL)
        os.kill(pids(fleet)[1], signal.SIGKILL)
        assert await consume(fleet, 5, SamplingParams(max_tokens=3)) == 3
