"""When a node of a cluster is empty, and by which names it is known. Engines and the cluster are told what to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from test_engine_client import in_loop

from phalanx.config import ClusterConfig
from phalanx.engine import draining
from phalanx.engine.draining import Draining
from phalanx.engine.members import Members
from phalanx.errors import RequestError
from phalanx.topology.apart import Fit
from phalanx.topology.placement import Node

DEADLINE_S = 10.0
TURNS = 50
"""Of the event loop: a drain looks in each."""
ALPHA = Node("a", "alpha", "10.0.0.1", 4, 4, is_driver=True)
BETA = Node("b", "beta", "10.0.0.2", 4, 4)


class FakeEngine:
    """One that says where it is when it is asked to avoid a node, unless it is not to."""

    def __init__(self, home: str | None, *, tells: bool = True) -> None:
        self.home = home
        self.tells = tells
        self.dead = self.down = None
        self.stats = object()

    @property
    def nodes(self) -> tuple[str, ...]:
        return () if self.home is None else (self.home,)

    def has_left(self, node: str) -> bool:
        return self.tells and node not in self.nodes

    def avoid(self, nodes: tuple[str, ...]) -> None:
        pass


class Fleet:
    """Of one that has room for as many as one likes, which are then on alpha."""

    def __init__(self, *engines: FakeEngine, avoid_nodes: tuple[str, ...] = ()) -> None:
        members = Members(engines)  # type: ignore[arg-type]
        self.engines: Any = members.engines
        self.roster = members.roster
        self.nodes = [ALPHA, BETA]
        self.starting: set[int] = set()
        self.config = SimpleNamespace(cluster=ClusterConfig(avoid_nodes=avoid_nodes))
        fake: Any = self
        self.draining = Draining(members, fake, fake, fake)

    def avoid(self, nodes: tuple[str, ...]) -> None:
        self.config = SimpleNamespace(cluster=ClusterConfig(avoid_nodes=nodes))

    async def node_called(self, name: str) -> Node:
        for node in self.nodes:
            if node.is_called(name):
                return node
        raise RequestError("node", name, "the cluster has others")

    async def fit(self, size: int, numbers: list[int]) -> Fit:
        return Fit(len(numbers), None)

    async def begin(self, size: int, leaving: Any, **_: Any) -> asyncio.Task[None]:
        for number in leaving:
            del self.engines[number]
            self.roster._phases.pop(number)
        for number in self.roster.free_numbers(size - self.roster.size):
            self.engines[number] = FakeEngine("alpha")
            self.roster._phases[number] = "serving"
        return asyncio.create_task(asyncio.sleep(0))

    async def drain_once(self, change: Callable[[], None]) -> None:
        """Take all off beta; `change` happens when there is nothing to do but to wait."""
        async with asyncio.timeout(DEADLINE_S):
            drained = await self.draining.begin("beta", 0.0)
            for _ in range(TURNS):
                await asyncio.sleep(0)
            assert not drained.done(), "nobody knows yet whether it is empty"
            change()
            await drained


@pytest.fixture(autouse=True)
def looks_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "LOOK_S", 0.0)


@in_loop
async def test_a_replica_that_has_not_told_yet_where_it_is_may_be_there() -> None:
    engine = FakeEngine(None, tells=False)
    fleet = Fleet(FakeEngine("alpha"), engine)

    def come_up_on_the_node() -> None:
        engine.home, engine.tells = "beta", True

    await fleet.drain_once(come_up_on_the_node)
    assert engine not in fleet.engines.values()
    assert [one.home for one in fleet.engines.values()] == ["alpha", "alpha"]


@in_loop
async def test_one_that_comes_up_elsewhere_stays() -> None:
    engine = FakeEngine(None, tells=False)
    fleet = Fleet(FakeEngine("alpha"), engine)

    def come_up_elsewhere() -> None:
        engine.home, engine.tells = "alpha", True

    await fleet.drain_once(come_up_elsewhere)
    assert fleet.engines[1] is engine


@in_loop
async def test_an_engine_that_is_just_being_replaced_may_come_up_there() -> None:
    """Its start may have begun before anybody thought of draining."""
    fleet = Fleet(FakeEngine("alpha"), FakeEngine(None))
    fleet.starting.add(1)
    replaced = fleet.engines[1]

    def come_up_on_the_node() -> None:
        fleet.starting.clear()
        fleet.engines[1] = FakeEngine("beta")

    await fleet.drain_once(come_up_on_the_node)
    assert replaced not in fleet.engines.values()
    assert all(one.home == "alpha" for one in fleet.engines.values())


@in_loop
async def test_one_that_is_ending_is_there_until_it_has_ended() -> None:
    fleet = Fleet(FakeEngine("alpha"), FakeEngine("alpha"))
    fleet.roster._phases[1] = "ending"

    def end() -> None:
        del fleet.engines[1], fleet.roster._phases[1]

    await fleet.drain_once(end)


@in_loop
async def test_a_node_is_avoided_once_whatever_it_is_called_and_no_more_when_it_is_of_use_again() -> None:
    fleet = Fleet(FakeEngine("alpha"), avoid_nodes=("10.0.0.2", "10.0.0.9"))
    await (await fleet.draining.begin("b", 0.0))
    assert fleet.draining.drained == ("10.0.0.9", "beta")
    await fleet.draining.undo("beta")
    assert fleet.draining.drained == ("10.0.0.9",)


@pytest.mark.parametrize("avoided", [("10.0.0.2",), ("beta", "10.0.0.2"), ("b", "beta")])
@in_loop
async def test_so_when_it_was_given_by_another_name_at_the_start(avoided: tuple[str, ...]) -> None:
    fleet = Fleet(FakeEngine("alpha"), avoid_nodes=avoided)
    await fleet.draining.undo("beta")
    assert fleet.draining.drained == ()


@in_loop
async def test_one_that_is_not_in_the_cluster_now_has_the_name_that_it_was_given() -> None:
    fleet = Fleet(FakeEngine("alpha"), avoid_nodes=("gamma", "beta"))
    await fleet.draining.undo("gamma")
    assert fleet.draining.drained == ("beta",)
    with pytest.raises(RequestError, match="'delta' is not possible"):
        await fleet.draining.undo("delta")
