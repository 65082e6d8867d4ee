"""The actors of one line: one for each rank, and the agents of the nodes beside the driver's."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from phalanx.config import ClusterConfig, Config
from phalanx.errors import StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.ray.agents import Agents, kill_ranks
from phalanx.executor.ray.assignment import PlacedRank, address_of, assign
from phalanx.executor.ray.calls import answers_to, explain
from phalanx.executor.ray.environment import environment_for_workers, runtime_env
from phalanx.executor.ray.messages import Introduction, NodeOrder, Preparation, RankOrder
from phalanx.executor.ray.node_agent import tail
from phalanx.executor.ray.rank_actor import RankActor
from phalanx.executor.ray.reservation import Reservation
from phalanx.protocol import StartProgress
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Node
from phalanx.transport.address import numeric_address
from phalanx.transport.interfaces import InterfaceAddress, interface_addresses
from phalanx.transport.liveness import Party

log = logging.getLogger("phalanx.executor")

TAIL_TIMEOUT_S = 0.5
TAIL_LINES = 15


class Crew:
    """Actors that are made at once, all at the same time. `close` ends the ranks."""

    def __init__(
        self,
        config: Config,
        grid: Grid,
        checkpoint: str,
        reservation: Reservation,
        agents: Agents,
        epoch: int,
        deadline: Deadline,
    ) -> None:
        """Ask Ray for the actors, which are to come and to be linked by the deadline; returns before they are there."""
        self.epoch = epoch
        self._config = config
        self._grid = grid
        self._checkpoint = checkpoint
        self._reservation = reservation
        self._instance = secrets.token_hex(4)
        self.deadline = deadline
        self._agents = agents
        self.ranks: list[Any] = []  # Ray's handles have the methods of their actors, of which no checker knows
        self.agents: dict[str, Any] = {}
        """By node id."""
        self.placed: tuple[PlacedRank, ...] = ()
        self.brain_address = ""
        """Where the other nodes reach this one, once the actors have introduced themselves."""
        self.raylet: Party | None = None
        """Ray's own process on this node, once actors on this node have introduced themselves."""
        try:
            for place in reservation.places:
                self.ranks.append(self._make_rank(place.rank))
            used = dict.fromkeys(place.node_id for place in reservation.places)
            self.agents = agents.of(
                (node_id for node_id in used if not reservation.nodes[node_id].is_driver), self._instance
            )
        except Exception as error:
            self.close()
            raise StartError("an actor", "asking Ray for it", explain(error)) from error

    def introduce(self, on_progress: OnProgress) -> tuple[PlacedRank, ...]:
        """Wait for all actors and learn where they are.

        Raises StartError or DeadlineError naming those that do not come; ConfigError, PlacementError.
        """
        places, nodes = self._reservation.places, self._reservation.nodes
        calls: dict[ObjectRef[Any], str] = {}
        for place, actor in zip(places, self.ranks, strict=True):
            on_progress(StartProgress(place.rank, "starting", node=nodes[place.node_id].name))
            preparation = msgspec.msgpack.encode(self._preparation(place.node_id))
            calls[actor.introduce.remote(preparation)] = f"rank {place.rank} on {nodes[place.node_id].name}"
        for node_id, agent in self.agents.items():
            calls[agent.introduce.remote()] = self.agent_name(node_id)
        answers = answers_to(calls, "starting", self.deadline.remaining_s)
        said = [msgspec.msgpack.decode(answer, type=Introduction) for answer in answers]
        of_node = {one.node_id: one.addresses for one in said}
        addresses = addresses_of(
            self._config.cluster, nodes, {place.node_id: of_node[place.node_id] for place in places}
        )
        self.brain_address = addresses[self.driver_node.node_id]
        for one in said:
            if nodes[one.node_id].is_driver:
                self.raylet = Party.of("raylet", one.raylet_pid)
        self.placed = assign(self._grid, places, said[: len(places)], nodes, addresses)
        for rank in self.placed:
            log.info(
                "rank %d is on %s (%s), pid %d; its log: %s", rank.rank, rank.node, rank.address, rank.pid, rank.log
            )
        return self.placed

    @property
    def driver_node(self) -> Node:
        return _driver_of(self._reservation.nodes)

    @property
    def has_ray(self) -> bool:
        """Whether it can be called. Otherwise it has ended all actors, and a call may hang, or start another Ray."""
        return ray.is_initialized() and (self.raylet is None or self.raylet.is_alive())

    def ranks_of_agents(self) -> dict[str, list[int]]:
        """The ranks of each node that has an agent, by node id."""
        return {node_id: [rank.rank for rank in self.placed if rank.node_id == node_id] for node_id in self.agents}

    def agent_name(self, node_id: str) -> str:
        return f"the agent of node {self._reservation.nodes[node_id].name}"

    def prepare_nodes(self, orders: Mapping[str, NodeOrder]) -> dict[ObjectRef[Any], str]:
        """Have agents, by node id, carry out their orders: calls to await, each with the name of its agent."""
        return {
            self.agents[node_id].prepare.remote(msgspec.msgpack.encode(order)): self.agent_name(node_id)
            for node_id, order in orders.items()
        }

    def run_nodes(self) -> dict[ObjectRef[Any], str]:
        """Have the agents relay; calls that end with their links."""
        return {agent.run.remote(self.epoch): node_id for node_id, agent in self.agents.items()}

    def run_rank(self, order: RankOrder) -> ObjectRef[Any]:
        """Have a rank run; a call that ends with it."""
        call: ObjectRef[Any] = self.ranks[order.spec.rank].run.remote(msgspec.msgpack.encode(order))
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

    def close(self) -> None:
        """Kill every rank; some may take a moment to end."""
        if not self.has_ray:
            return
        kill_ranks(self.agents, self.epoch)
        for actor in self.ranks:
            ray.kill(actor)

    def _tail(self, placed: PlacedRank) -> str:
        if placed.is_driver_node:
            return tail(placed.log)
        try:
            return str(ray.get(self.agents[placed.node_id].tail.remote(placed.log), timeout=TAIL_TIMEOUT_S))
        except Exception:  # the node is gone, or does not answer: then there is no log to be had
            return ""

    def _preparation(self, node_id: str) -> Preparation:
        return Preparation(
            environment=environment_for_workers(os.environ),
            threads=self._config.executor.threads_per_rank,
            ranks_on_host=sum(1 for place in self._reservation.places if place.node_id == node_id),
            device="cuda" if self._reservation.demand.is_device else "cpu",
            checkpoint=self._checkpoint,
        )

    def _make_rank(self, rank: int) -> Any:
        demand, place = self._reservation.demand, self._reservation.places[rank]
        replica, stage, tp_rank = self._grid.coordinates(rank)
        actor: Any = ray.remote(RankActor)
        return actor.options(
            name=f"phalanx-{self._instance}-rank{rank}-dp{replica}-pp{stage}-tp{tp_rank}",
            num_cpus=0 if demand.is_device else demand.per_rank,
            num_gpus=demand.per_rank if demand.is_device else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._reservation.group, place.bundle),
            runtime_env=runtime_env(self._config.cluster),
        ).remote()


def addresses_of(
    cluster: ClusterConfig, nodes: Mapping[str, Node], held: Mapping[str, Sequence[InterfaceAddress]]
) -> dict[str, str]:
    """Where the driver's node and each that holds addresses are reached, by id: all over the same version of IP.

    `node_address` is the driver's word for its own node: whatever else that node has does not matter. Raises
    ConfigError when a node has no address that fits.
    """
    driver, interface = _driver_of(nodes), cluster.network_interface
    if cluster.node_address is None:
        own, version = address_of(driver, interface_addresses(), interface), None
    else:
        own = numeric_address(cluster.node_address)
        version = ipaddress.ip_address(own).version
    found = {
        node_id: address_of(nodes[node_id], those, interface, version)
        for node_id, those in held.items()
        if node_id != driver.node_id
    }
    return {**found, driver.node_id: own}


def _driver_of(nodes: Mapping[str, Node]) -> Node:
    return next(node for node in nodes.values() if node.is_driver)
