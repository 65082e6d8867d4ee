"""Keeps the memory of ranks that may die, on whatever node they are: this process on its own, agents on the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from phalanx.errors import StartError
from phalanx.executor.ray.calls import explain
from phalanx.memory.held import HeldMemory, decode_held, encode_held
from phalanx.memory.holder import Holder

if TYPE_CHECKING:
    from phalanx.executor.ray.placement import RayPlacement

ANSWER_S = 5.0


class _Elsewhere(NamedTuple):
    """What an agent holds."""

    node_id: str
    agent: Any  # Ray's handles have methods of which no checker knows
    memory: HeldMemory


class NodesHolder:
    """As Holder, for ranks on the nodes of a cluster. It is lost with a node's agent, and when agents are renewed.

    Belongs to one thread.
    """

    def __init__(self, placement: RayPlacement) -> None:
        self._placement = placement
        self._here = Holder()
        self._elsewhere: dict[int, _Elsewhere] = {}

    def hold(self, rank: int, told: HeldMemory) -> HeldMemory:
        """As Holder. Raises StartError, too, if an agent does not do it."""
        actors = self._placement.actors
        placed = actors.placed[rank]
        if placed.is_driver_node:
            return self._here.hold(rank, told)
        agent = actors.agents[placed.node_id]
        try:
            answer: bytes = ray.get(agent.hold.remote(rank, encode_held(told)), timeout=ANSWER_S)
        except Exception as error:
            raise StartError(
                actors.agent_name(placed.node_id), f"holding the memory of rank {rank}", explain(error)
            ) from error
        self._elsewhere[rank] = _Elsewhere(placed.node_id, agent, decode_held(answer))
        return self._elsewhere[rank].memory

    def memory(self, rank: int) -> HeldMemory | None:
        """As Holder; None also if its agent is lost."""
        held = self._elsewhere.get(rank)
        if held is None:
            return self._here.memory(rank)
        return held.memory if self._is_there(held) else None

    def drop(self, rank: int) -> None:
        """As Holder. Returns before an agent has done it."""
        self._here.drop(rank)
        held = self._elsewhere.pop(rank, None)
        if held is not None and self._is_there(held) and self._placement.has_ray:
            held.agent.drop.remote(rank)

    def close(self) -> None:
        """Let go of everything. May be called more than once."""
        self._here.close()
        for rank in list(self._elsewhere):
            self.drop(rank)

    def _is_there(self, held: _Elsewhere) -> bool:
        return self._placement.agents.living(held.node_id) is held.agent
