"""A fleet on the nodes of a cluster: where new replicas go, a node that is drained, one that is lost, and growing back.

Engines are fake processes; the cluster is a table of how many replicas each node holds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import engine_tiny_tokenizers as tiny
import pytest
from test_engine_client import TIMEOUT_S, command, in_loop, until
from test_engine_fleet import Reader, config_of, counts, end, go_on, states

from phalanx.engine import growth
from phalanx.engine.client import EngineClient
from phalanx.engine.fleet import Fleet
from phalanx.errors import ConfigError, RequestError, ResizeError, ResizeRefusedError
from phalanx.topology.placement import Node


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_text('{"vocab_size": 400}')
    return tiny.save(tiny.byte_level(), directory)


class Cluster:
    """Each engine is where there was room when it came, the first node first."""

    def __init__(self, room: dict[str, int]) -> None:
        self.room = room
        self.fleet: Fleet | None = None
        self.lost: dict[int, str] = {}
        """What is missing, by the pids of engines."""
        self._homes: dict[int, str] = {}

    def homes(self) -> dict[int, str]:
        """The node of each replica."""
        assert self.fleet is not None
        engines = dict(sorted(self.fleet._members.engines.items()))
        pids = {number: engine.condition.pid for number, engine in engines.items() if engine.dead is None}
        self._homes = {pid: home for pid, home in self._homes.items() if pid in pids.values()}
        for pid in pids.values():
            if pid not in self._homes:
                used, avoided = Counter(self._homes.values()), self.fleet.strength.drained_nodes
                free = [name for name in self.room if self.room[name] > used[name] and name not in avoided]
                self._homes[pid] = free[0]
        return {number: self._homes[pid] for number, pid in pids.items()}

    def nodes_of(self, engine: EngineClient) -> tuple[str, ...]:
        self.homes()
        home = self._homes.get(engine.condition.pid)
        return () if home is None else (home,)

    def lose(self, name: str) -> None:
        """A node, with all that is there."""
        self.homes()
        del self.room[name]
        self.lost |= {pid: f"lost: {name}" for pid, home in self._homes.items() if home == name}

    async def nodes(self, resource: str) -> Sequence[Node]:
        """As a census tells."""
        assert resource == "CPU"
        used = Counter(self.homes().values())
        return [
            Node(name, name, f"10.0.0.{i}", held, held - used[name], is_driver=i == 1)
            for i, (name, held) in enumerate(self.room.items(), 1)
        ]

    async def close(self) -> None:
        pass


@asynccontextmanager
async def fleet_on(
    cluster: Cluster, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(EngineClient, "nodes", property(cluster.nodes_of))
    monkeypatch.setattr(EngineClient, "lacks_room", property(lambda engine: cluster.lost.get(engine.condition.pid)))
    monkeypatch.setattr(growth, "LOOK_S", 0.01)
    config = config_of(checkpoint, launcher="ray", **settings)
    async with asyncio.timeout(TIMEOUT_S):
        fleet = await Fleet.start(config, command=command("is-paced"))
        fleet._room._census = cluster  # type: ignore[assignment]
        cluster.fleet = fleet
        cluster.homes()
        try:
            await until(lambda: all(engine.stats is not None for engine in fleet._members.engines.values()))
            yield fleet
        finally:
            await fleet.close()


@in_loop
async def test_a_resize_is_refused_before_anything_starts_and_done_when_a_node_has_joined(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2) as fleet:
        with pytest.raises(ConfigError, match=r"data_parallel_size: 3 is not possible: 1 ranks .*beta 0 of 1"):
            await fleet.resize(3)
        assert states(fleet) == {0: "serving", 1: "serving"}
        cluster.room["gamma"] = 1
        await fleet.resize(3)
        assert cluster.homes() == {0: "alpha", 1: "beta", 2: "gamma"}
        assert fleet.strength.wanted == 3


@in_loop
async def test_a_drained_node_is_replaced_by_another_one_and_streams_go_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1, "gamma": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 3)]
        await go_on(readers)
        with pytest.raises(RequestError, match=r"node: 'delta' is not possible: the cluster has alpha \(10.0.0.1\)"):
            await fleet.begin_drain("delta")
        draining = await fleet.begin_drain("10.0.0.2", drain_timeout_s=0.0)
        for other in (fleet.begin_resize(3), fleet.begin_drain("alpha")):
            with pytest.raises(ResizeRefusedError, match="node beta is being drained"):
                await other
        await draining
        assert cluster.homes() == {0: "alpha", 2: "gamma"}
        assert (fleet.strength.drained_nodes, fleet.strength.num_missing, fleet.strength.num_lost) == (("beta",), 0, 0)
        with pytest.raises(ConfigError, match=r"beta 1 of 1 \(avoided\)"):
            await fleet.resize(3)
        await end(readers)


@in_loop
async def test_without_room_elsewhere_a_drained_replica_is_missing_until_the_node_is_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2, auto_grow=True) as fleet:
        await (await fleet.begin_drain("beta", drain_timeout_s=0.0))
        assert (fleet.strength.num_missing, fleet.strength.missing_because) == (1, "node beta is drained")
        with pytest.raises(ConfigError, match="all replicas have ranks there, and no other node has room for one"):
            await fleet.begin_drain("alpha")
        assert fleet.strength.drained_nodes == ("beta",)
        await fleet.undo_drain("beta")
        await until(lambda: fleet.strength.num_grown == 1)
        assert (cluster.homes(), fleet.strength.num_missing) == ({0: "alpha", 1: "beta"}, 0)


@in_loop
async def test_room_that_leaving_replicas_free_is_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster({"alpha": 2, "beta": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=3) as fleet:
        monkeypatch.setattr(  # one has a rank on both
            EngineClient, "nodes", property(lambda engine: ("alpha", "beta") if engine is both else ("alpha",))
        )
        both = fleet._members.engines[2]
        await (await fleet.begin_drain("beta", drain_timeout_s=0.0))
        assert fleet.strength.num_missing == 1, "alpha is full"
        await fleet.undo_drain("beta")
        both = fleet._members.engines[1]
        await (await fleet.begin_drain("beta", drain_timeout_s=0.0))
        assert set(cluster.homes().values()) == {"alpha"}
        assert (len(cluster.homes()), fleet.strength.num_missing) == (2, 1)


@in_loop
async def test_a_drain_that_is_cancelled_leaves_all_as_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1, "gamma": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 3)]
        await go_on(readers)
        draining = await fleet.begin_drain("beta", drain_timeout_s=3600.0)
        await until(lambda: "leaving" in states(fleet).values())
        draining.cancel()
        await asyncio.wait((draining,))
        assert draining.cancelled()
        assert states(fleet) == {0: "serving", 1: "serving"}
        assert fleet.strength.drained_nodes == ()
        await end(readers)


@in_loop
async def test_a_replica_whose_node_is_lost_leaves_its_requests_to_the_others_and_comes_back_with_a_node(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2, auto_grow=True) as fleet:
        readers = [Reader(fleet, 10 * i) for i in range(1, 5)]
        await until(lambda: counts(fleet) == {0: 2, 1: 2})
        cluster.lose("beta")
        await until(lambda: counts(fleet) == {0: 4})
        await go_on(readers)
        assert (fleet.strength.num_missing, fleet.strength.missing_because) == (1, "lost: beta")
        cluster.room["gamma"] = 1
        await until(lambda: not fleet.strength.num_missing and fleet.strength.num_grown == 1)
        assert cluster.homes() == {0: "alpha", 1: "gamma"}
        cluster.lose("gamma")
        await until(lambda: fleet.strength.num_missing == 1)
        cluster.lose("alpha")
        await until(lambda: set(states(fleet)) == {0})
        await asyncio.sleep(0.05)
        assert set(states(fleet)) == {0}, "the last one waits for room by itself"
        await end(readers)


@in_loop
async def test_an_operators_wish_comes_before_growth_and_what_is_not_wanted_does_not_come_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"alpha": 1, "beta": 1})
    async with fleet_on(cluster, checkpoint, monkeypatch, data_parallel_size=2, auto_grow=True) as fleet:
        start = asyncio.Event()

        async def late(*_: Any, **__: Any) -> EngineClient:
            await start.wait()
            raise ResizeError("never")

        monkeypatch.setattr(fleet._joining, "start", late)
        cluster.lose("beta")
        await until(lambda: states(fleet) == {0: "serving"})
        cluster.room["gamma"] = 1
        await until(lambda: states(fleet) == {0: "serving", 1: "joining"})
        await fleet.resize(1)
        assert (states(fleet), fleet.strength.num_missing) == ({0: "serving"}, 0)
        await asyncio.sleep(0.05)
        assert states(fleet) == {0: "serving"}
