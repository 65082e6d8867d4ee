"""A node that ranks in lockstep are taken off. The engine is a fake process; where its ranks are is a table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from engine_fake_process import DIES, FAILS, NEVER_READY, REFUSED
from test_engine_client import checkpoint, client_of, in_loop, until

from phalanx.engine.client import EngineClient
from phalanx.errors import ConfigError, RequestError, ResizeError, ResizeRefusedError, ResizeUnderWayError
from phalanx.protocol.client import AvoidNodes
from phalanx.topology.placement import Node

__all__ = ["checkpoint"]


class Cluster:
    """As a census tells of it."""

    async def nodes(self, resource: str) -> Sequence[Node]:
        return [Node(name[0], name, f"10.0.0.{i}", 2, 0) for i, name in enumerate(("alpha", "beta", "gamma"), 1)]

    async def close(self) -> None:
        pass


@asynccontextmanager
async def client_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, size: int, *, nodes: tuple[str, ...] = ("alpha", "beta")
) -> AsyncIterator[tuple[EngineClient, list[tuple[str, ...]]]]:
    """And the nodes that its engine has been told to avoid, each time. `size` says what becomes of a move."""
    monkeypatch.setattr(EngineClient, "nodes", nodes)
    async with client_of(checkpoint, launcher="ray") as client:
        client._draining._census = Cluster()  # type: ignore[assignment]
        client.info = msgspec.structs.replace(client.info, num_replicas=size)
        told: list[tuple[str, ...]] = []
        send = client._incarnation.send

        def note(message: object) -> None:
            if isinstance(message, AvoidNodes):
                told.append(message.nodes)
            send(message)  # type: ignore[arg-type]

        monkeypatch.setattr(client._incarnation, "send", note)
        yield client, told


@in_loop
async def test_all_ranks_move_and_none_comes_back_until_it_is_undone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_on(checkpoint, monkeypatch, 2) as (client, told):
        await (await client.begin_drain("10.0.0.2"))
        assert told == [("beta",)] and client.size == (2, 1)
        assert client.strength.drained_nodes == ("beta",)
        await (await client.begin_drain("gamma"))
        assert told[1:] == [("beta", "gamma")], "where no rank is"
        with pytest.raises(RequestError, match=r"node: 'delta' is not possible: the cluster has alpha \(10.0.0.1\)"):
            await client.begin_drain("delta")
        await client.undo_drain("10.0.0.2")
        await client.undo_drain("gamma")
        assert told[2:] == [("gamma",), ()] and client.strength.drained_nodes == ()


@in_loop
async def test_undone_while_the_engine_is_silent(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_on(checkpoint, monkeypatch, 2) as (client, told):
        monkeypatch.setattr(client, "has_left", lambda node: False)
        draining = await client.begin_drain("gamma")
        await client.undo_drain("gamma")
        with pytest.raises(ResizeError, match="node gamma again: its drain was undone"):
            await draining
        assert told[-1] == () and client.strength.drained_nodes == ()


@in_loop
async def test_no_room_elsewhere(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_on(checkpoint, monkeypatch, REFUSED) as (client, told):
        with pytest.raises(ConfigError, match=r"node: 'beta' .* no room for all ranks: there are 2 cores"):
            await client.begin_drain("beta")
        assert told == [("beta",), ()] and client.strength.drained_nodes == ()


@pytest.mark.parametrize("size", [FAILS, DIES])
def test_what_fails_leaves_all_as_before(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    async def run() -> None:
        async with client_on(checkpoint, monkeypatch, size) as (client, _):
            with pytest.raises(ResizeError, match=r"to other nodes: (rank 2 did not start|.*killed by SIGKILL)"):
                await (await client.begin_drain("beta"))
            assert client.strength.drained_nodes == ()

    asyncio.run(run())


@in_loop
async def test_cancelled_and_others_refused_meanwhile(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_on(checkpoint, monkeypatch, NEVER_READY) as (client, told):
        draining = await client.begin_drain("beta")
        await until(lambda: client._resizes._resize is not None and client._resizes._resize.progress is not None)
        assert len(client.replicas()) == NEVER_READY, "none joins"
        for other in (client.begin_drain("alpha"), client.begin_resize(2), client.undo_drain("beta")):
            with pytest.raises(ResizeUnderWayError):
                await other
        draining.cancel()
        await asyncio.wait([draining])
        assert draining.cancelled() and told == [("beta",), ()]


@in_loop
async def test_ranks_that_are_nowhere_yet_and_no_cluster(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_on(checkpoint, monkeypatch, 2, nodes=()) as (client, told):
        with pytest.raises(ResizeRefusedError, match="has not told yet where its ranks are"):
            await client.begin_drain("beta")
        assert not told
    async with client_of(checkpoint) as client:
        with pytest.raises(RequestError, match="all ranks are on this host"):
            await client.begin_drain("beta")
