"""Who holds the memory of which rank, and when it is lost. Needs no Ray that runs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.errors import StartError
from phalanx.executor.ray import holding
from phalanx.executor.ray.holding import NodesHolder
from phalanx.memory.held import HeldMemory, Region, encode_held
from phalanx.transport.shared_memory import SharedSegment

ELSEWHERE = HeldMemory((), {"as it is held there": Region(0, 0, 8)})


class FakeAgent:
    """Answers with what it holds, or not at all."""

    def __init__(self) -> None:
        self.answers = True
        self.dropped: list[int] = []
        self.hold = SimpleNamespace(remote=lambda rank, told: self)
        self.drop = SimpleNamespace(remote=self.dropped.append)


@pytest.fixture
def placement(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 0 is on the engine's node, rank 1 on another."""

    def get(agent: FakeAgent, timeout: float) -> bytes:
        if not agent.answers:
            raise TimeoutError("no answer")
        return encode_held(ELSEWHERE)

    monkeypatch.setattr(holding, "ray", SimpleNamespace(get=get))
    agents = {"b": FakeAgent()}
    placed = [SimpleNamespace(is_driver_node=not rank, node_id="ab"[rank]) for rank in range(2)]
    actors = SimpleNamespace(placed=placed, agents=dict(agents), agent_name=lambda node_id: f"the agent of {node_id}")
    return SimpleNamespace(actors=actors, agents=SimpleNamespace(living=agents.get, actors=agents), has_ray=True)


@pytest.fixture
def memory() -> Iterator[HeldMemory]:
    """Of a rank that lives."""
    with SharedSegment.create(8, "memory of a rank") as segment:
        yield HeldMemory((segment.handle,), {"weight": Region(0, 0, 8)})


def test_each_node_holds_what_is_there(placement: Any, memory: HeldMemory) -> None:
    holder = NodesHolder(placement)
    assert holder.hold(0, memory).regions == memory.regions
    assert holder.hold(1, memory) == holder.memory(1) == ELSEWHERE
    agent = placement.actors.agents["b"]
    holder.close()
    assert holder.memory(0) is None and holder.memory(1) is None
    assert agent.dropped == [1]


@pytest.mark.parametrize("other", [None, FakeAgent()], ids=["lost", "another"])
def test_it_is_lost_with_the_agent(placement: Any, memory: HeldMemory, other: FakeAgent | None) -> None:
    holder = NodesHolder(placement)
    holder.hold(0, memory)
    holder.hold(1, memory)
    placement.agents.actors["b"] = other
    assert holder.memory(0) is not None and holder.memory(1) is None
    holder.close()
    assert not placement.actors.agents["b"].dropped


def test_an_agent_that_does_not_answer_is_named(placement: Any, memory: HeldMemory) -> None:
    placement.actors.agents["b"].answers = False
    with pytest.raises(StartError, match=r"agent of b did not start: no answer \(while holding the memory of rank 1"):
        NodesHolder(placement).hold(1, memory)
