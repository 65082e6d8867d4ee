"""The processes of one line: one for each rank, made by the rank's actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import ray
from ray import ObjectRef

from phalanx.config import Config
from phalanx.executor.deadline import Deadline
from phalanx.executor.ray.agents import Agents, kill_ranks
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.calls import answers_to
from phalanx.executor.ray.environment import environment_for_workers
from phalanx.executor.ray.messages import NodeOrder, Preparation
from phalanx.executor.ray.node_agent import tail
from phalanx.executor.ray.rank_actors import RankActors
from phalanx.topology.placement import Node
from phalanx.transport.liveness import Party
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.executor")

TAIL_TIMEOUT_S = 0.5
TAIL_LINES = 15


class LineProcesses:
    """`make` before anything else. `kill` ends the ranks, and no other line's."""

    def __init__(
        self, config: Config, actors: RankActors, agents: Agents, checkpoint: str, epoch: int, deadline: Deadline
    ) -> None:
        """`deadline`: for the processes to come and to be linked."""
        self.epoch = epoch
        self.deadline = deadline
        self.agents: Mapping[str, Any] = dict(actors.agents)
        """By node id."""
        self.placed: tuple[PlacedRank, ...] = ()
        """With the pids of this line's processes, once they are there."""
        self._config = config
        self._actors = actors
        self._agents = agents
        self._checkpoint = checkpoint
        self._is_ended = False

    def make(self) -> tuple[PlacedRank, ...]:
        """Have each actor make a process, which waits for its order.

        Raises StartError or DeadlineError naming those that do not come.
        """
        calls: dict[ObjectRef[Any], str] = {}
        for place, actor in zip(self._actors.reservation.places, self._actors.ranks, strict=True):
            preparation = msgspec.msgpack.encode(self._preparation(self._actors.placed[place.rank]))
            calls[actor.make_process.remote(preparation)] = self._actors.rank_name(place)
        pids = answers_to(calls, "starting", self.deadline.remaining_s)
        self.placed = tuple(
            msgspec.structs.replace(placed, pid=pid) for placed, pid in zip(self._actors.placed, pids, strict=True)
        )
        for rank in self.placed:
            log.info(
                "rank %d is on %s (%s), pid %d; its log: %s", rank.rank, rank.node, rank.address, rank.pid, rank.log
            )
        return self.placed

    @property
    def brain_address(self) -> str:
        """Where the other nodes reach this one."""
        return self._actors.brain_address

    @property
    def raylet(self) -> Party | None:
        """Ray's own process on this node, if ranks are on it."""
        return self._actors.raylet

    @property
    def driver_node(self) -> Node:
        return self._actors.driver_node

    @property
    def has_ray(self) -> bool:
        """As of RankActors."""
        return self._actors.has_ray

    def ranks_of_agents(self) -> dict[str, list[int]]:
        """The ranks of each node that has an agent, by node id."""
        return {node_id: [rank.rank for rank in self.placed if rank.node_id == node_id] for node_id in self.agents}

    def agent_name(self, node_id: str) -> str:
        return self._actors.agent_name(node_id)

    def prepare_nodes(self, orders: Mapping[str, NodeOrder]) -> dict[ObjectRef[Any], str]:
        """Have agents, by node id, carry out their orders: calls to await, each with the name of its agent."""
        return {
            self.agents[node_id].prepare.remote(msgspec.msgpack.encode(order)): self.agent_name(node_id)
            for node_id, order in orders.items()
        }

    def run_nodes(self) -> dict[ObjectRef[Any], str]:
        """Have the agents relay; calls that end with their links."""
        return {agent.run.remote(self.epoch): node_id for node_id, agent in self.agents.items()}

    def run_rank(self, spec: WorkerSpec) -> ObjectRef[Any]:
        """Have a rank run; a call that ends with it."""
        call: ObjectRef[Any] = self._actors.ranks[spec.rank].run.remote(msgspec.msgpack.encode(spec))
        return call

    def last_words(self, rank: int) -> str:
        """Where the rank's log is, and how it ends."""
        placed = self.placed[rank]
        end = self._tail(placed).strip().splitlines()[-TAIL_LINES:]
        said = "".join(f"\n  {line}" for line in end)
        return f"its log is {placed.node}:{placed.log}{' and ends:' if end else ''}{said}"

    def kill_remote(self) -> None:
        """Have agents kill the ranks of their nodes; returns at once. For any thread."""
        if ray.is_initialized():
            kill_ranks(self.agents, self.epoch)

    def end_remote(self) -> None:
        """Have agents kill the ranks of their nodes, and wait until they are gone."""
        if self.has_ray:
            self._agents.end_ranks(self.epoch, self.agents)

    def kill(self) -> None:
        """Kill every rank, also one that is still to come; some may take a moment to end. For any thread, and more than
        once."""
        if self._is_ended or not self.has_ray:
            return
        self._is_ended = True
        kill_ranks(self.agents, self.epoch)
        for actor in self._actors.ranks:
            actor.end.remote(self.epoch)

    def _tail(self, placed: PlacedRank) -> str:
        if placed.is_driver_node:
            return tail(placed.log)
        try:
            return str(ray.get(self.agents[placed.node_id].tail.remote(placed.log), timeout=TAIL_TIMEOUT_S))
        except Exception:  # the node is gone, or does not answer: then there is no log to be had
            return ""

    def _preparation(self, placed: PlacedRank) -> Preparation:
        return Preparation(
            epoch=self.epoch,
            rank=placed.rank,
            environment=environment_for_workers(os.environ),
            threads=self._config.executor.threads_per_rank,
            ranks_on_host=placed.ranks_on_host,
            visible_devices=",".join(placed.devices) if placed.devices else None,
            checkpoint=self._checkpoint,
            deadline_s=self.deadline.remaining_s,
        )
