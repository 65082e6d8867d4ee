"""A resize of replicas in lockstep, as the client of their engine sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_fake_process import DIES, FAILS, NEVER_READY, REFUSED
from test_engine_client import ENDLESS, checkpoint, client_of, in_loop, until

from phalanx.engine.client import EngineClient
from phalanx.errors import ConfigError, EngineDeadError, RequestError, ResizeError, ResizeUnderWayError
from phalanx.protocol.sampling import SamplingParams

__all__ = ["checkpoint"]


def size(client: EngineClient) -> tuple[int, int, int]:
    return (client.info.num_replicas, client.info.tensor_parallel_size, len(client.replicas()))


@in_loop
async def test_done(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        await client.resize(3)
        assert size(client) == (3, 1, 3)
        await until(lambda: client.stats is not None)
        assert client.stats is not None and len(client.stats.replicas) == 3, "though the engine has told of one"
        await client.resize(tensor_parallel_size=2)
        assert size(client) == (3, 2, 3)
        await client.resize(1)
        assert size(client) == (1, 2, 1)
        await client.resize(1)
        with pytest.raises(ConfigError, match="data_parallel_size"):
            await client.resize(0)


@in_loop
async def test_a_request_goes_on_through_it(checkpoint: Path) -> None:
    async with client_of(checkpoint, "is-paced") as client:
        deltas = client.generate([5, 6, 7], SamplingParams(max_tokens=200))
        assert (await anext(deltas)).token_ids
        await client.resize(2)
        assert client.num_running == 1 and client.replicas()[1].state == "serving"
        assert [delta async for delta in deltas][-1].finish_reason == "length"


@in_loop
async def test_refused(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        with pytest.raises(ConfigError, match="there are 2 cores"):
            await client.begin_resize(REFUSED)
        with pytest.raises(RequestError, match="leaving"):
            await client.begin_resize(2, leaving=[0])
        resizing = await client.begin_resize(NEVER_READY)
        with pytest.raises(ResizeUnderWayError, match="DP 1, TP 1 to DP 16, TP 1 is under way"):
            await client.begin_resize(2)
        resizing.cancel()
        await asyncio.wait([resizing])
        assert resizing.cancelled() and size(client) == (1, 1, 1)


@in_loop
async def test_those_that_join_are_shown_with_what_they_do(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        resizing = await client.begin_resize(NEVER_READY)
        await until(lambda: client.replicas()[-1].phase == "loading")
        assert [one.state for one in client.replicas()] == ["serving"] + 15 * ["joining"]
        assert (client.replicas()[15].replica, client.replicas()[15].done, client.replicas()[15].total) == (15, 3, 4)
        resizing.cancel()
        await asyncio.wait([resizing])


@in_loop
async def test_failed(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        with pytest.raises(ResizeError, match="from DP 1, TP 1 to DP 14, TP 1: rank 2 did not start"):
            await client.resize(FAILS)
        await client.resize(2)
        assert size(client) == (2, 1, 2), "another one can begin"


@in_loop
async def test_an_engine_that_dies_is_started_again_with_the_size_from_before(checkpoint: Path) -> None:
    async with client_of(checkpoint, "is-paced", engine_restarts=1) as client:
        await client.resize(2)
        deltas = client.generate([5, 6, 7], ENDLESS)
        await anext(deltas)
        with pytest.raises(ResizeError, match="killed by SIGKILL"):
            await client.resize(DIES)
        assert client._config.parallel.data_parallel_size == 2
        await anext(deltas)
        await deltas.aclose()


@in_loop
async def test_closing_ends_it(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        resizing = await client.begin_resize(NEVER_READY)
        await client.close()
        with pytest.raises(ResizeError, match="shut down"):
            await resizing
        with pytest.raises(EngineDeadError):
            await client.resize(2)
