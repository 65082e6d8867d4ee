"""Reload, sleep and wake through the client of one engine, and of a fleet; engines that end meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from contextlib import aclosing
from pathlib import Path

import engine_tiny_tokenizers as tiny
import pytest
from test_engine_client import client_of, in_loop, until
from test_engine_fleet import fleet_of, pids

from phalanx.config import Config
from phalanx.engine.stream import Origin
from phalanx.errors import MaintenanceError, ResizeRefusedError, UserError
from phalanx.memory.shared_weights import decode_shared
from phalanx.protocol.client import Reload, Sleep, Wake
from phalanx.protocol.sampling import SamplingParams

RELOAD = Reload(None, "now", 60.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text('{"vocab_size": 400}')
    return tiny.save(tiny.byte_level(), directory)


@in_loop
async def test_tokens_say_which_weights_have_made_them(checkpoint: Path) -> None:
    async with client_of(checkpoint, "is-paced") as client:
        origins: list[Origin] = []
        async with aclosing(client.generate([5, 6], SamplingParams(max_tokens=None))) as deltas:
            async for delta in deltas:
                origins += delta.origins
                if len(origins) == 3:
                    await client.maintain(Reload("/new", "now", 60.0))
                if origins[-1] == Origin(2, 1):
                    break
        assert set(origins) == {Origin(1, 1), Origin(2, 1)} and origins == sorted(origins)
        assert (client.weights_version, client.condition.weights_version, client.model) == (2, 2, "/new")


@in_loop
async def test_a_refusal_and_an_engine_that_ends_meanwhile(checkpoint: Path) -> None:
    async with client_of(checkpoint, "refuses-maintenance") as client:
        with pytest.raises(UserError, match="another model"):
            await client.maintain(RELOAD)
        assert client.weights_version == 1
    async with client_of(checkpoint, "dies-in-maintenance") as client:
        with pytest.raises(MaintenanceError, match="the engine has ended"):
            await client.maintain(RELOAD)


@in_loop
async def test_an_engine_that_is_started_again_sleeps_again(checkpoint: Path) -> None:
    async with client_of(checkpoint, engine_restarts=1) as client:
        await client.maintain(Sleep(2))
        assert client.asleep == 2
        settling = asyncio.create_task(client.until_settled())
        os.kill(client.condition.pid, signal.SIGKILL)
        await until(lambda: client.condition.num_restarts == 1)
        await until(lambda: client.condition.sleep_level == 2)
        assert not settling.done()
        await client.maintain(Wake(None))
        await settling
        assert client.asleep == 0


@in_loop
async def test_the_tokenizer_of_the_start_stays_after_a_reload(checkpoint: Path) -> None:
    """Of a model that was not given as a directory as well: what a trainer writes may have none."""
    async with client_of(checkpoint) as client:
        client._config = Config.build(model="org/name")
        await client.maintain(Reload("/new", "now", 60.0))
        assert (client._config.model.model, client._config.model.tokenizer) == ("/new", str(checkpoint))
        await client.maintain(Reload("/newer", "now", 60.0))
        assert (client._config.model.model, client._config.model.tokenizer) == ("/newer", str(checkpoint))


@in_loop
async def test_an_engine_that_comes_back_with_other_weights_says_so(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link, other = tmp_path / "current", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    link.symlink_to(checkpoint)
    async with client_of(link, engine_restarts=1) as client:
        link.unlink()
        link.symlink_to(other)
        os.kill(client.condition.pid, signal.SIGKILL)
        await until(lambda: client.condition.num_restarts == 1)
        await until(lambda: client.checkpoint == str(other))
        assert client.weights_version == 2
        assert f"the engine has come back with weights of {other}, not of {checkpoint}" in caplog.text


@in_loop
async def test_replicas_of_a_fleet_get_the_same_version_one_after_the_other(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        await fleet.maintain(Reload("/new", "now", 60.0))
        assert [one.weights_version for one in fleet.conditions()] == [2, 2]
        assert fleet._joining.seats.model == "/new"
        await fleet.maintain(Sleep(1))
        assert fleet.asleep == 1
        with pytest.raises(ResizeRefusedError, match="asleep"):
            await fleet.begin_resize(1)
        waiting = asyncio.create_task(fleet.until_settled())
        await fleet.maintain(Wake(None))
        await waiting
        assert await _num_tokens(fleet.generate([5, 6], SamplingParams(max_tokens=3))) == 3


@in_loop
async def test_one_replica_reads_weights_and_the_others_have_them_from_it(checkpoint: Path) -> None:
    async with fleet_of(checkpoint, data_parallel_size=3) as fleet:
        first, *others = [str(pid) for pid in pids(fleet)]

        async def whence() -> list[tuple[str, ...]]:
            engines = [fleet._members.engines[number] for number in range(3)]
            return [decode_shared(await engine.share_weights()).kind.versions for engine in engines]

        await fleet.maintain(RELOAD)
        expected = [(first,), *((other, first) for other in others)]
        assert await whence() == expected
        await fleet.maintain(Sleep(2))
        assert fleet.asleep == 2
        await fleet.maintain(Wake(None))
        assert fleet.asleep == 0 and await whence() == expected


@in_loop
async def test_of_a_fleet_all_get_new_weights_or_none(checkpoint: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    tiny.save(tiny.byte_level(), new)
    (new / "config.json").write_text("{}")
    async with fleet_of(checkpoint, data_parallel_size=2) as fleet:
        await fleet.maintain(Sleep(1))
        await fleet.maintain(Wake(None))
        last = fleet._members.engines[1]
        asked: list[list[int]] = []
        maintain = last.maintain

        async def refuse(order: Reload, **settings: int | None) -> None:
            asked.append([one.weights_version for one in fleet.conditions()])
            raise UserError("another model")

        last.maintain = refuse  # type: ignore[method-assign, assignment]
        with pytest.raises(UserError, match="another model"):
            await fleet.maintain(Reload(str(new), "now", 60.0))
        assert asked == [[2, 1]]
        assert [one.weights_version for one in fleet.conditions()] == [1, 1]
        assert {engine.model for engine in fleet._members.engines.values()} == {str(checkpoint)}
        assert (fleet._joining.weights_version, fleet._joining.seats.model) == (1, str(checkpoint))
        with pytest.raises(
            MaintenanceError, match=r"another model; the new weights stay in replica 0 \(.*have overwritten the"
        ):
            await fleet.maintain(Reload(str(checkpoint), "now", 60.0))
        last.maintain = maintain  # type: ignore[method-assign]
        await fleet.maintain(Reload(str(new), "now", 60.0))
        assert [one.weights_version for one in fleet.conditions()] == [4, 4], "2 and 3 were others"


async def _num_tokens(deltas: object) -> int:
    return sum([len(delta.token_ids) async for delta in deltas])  # type: ignore[attr-defined]
