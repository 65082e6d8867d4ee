"""The actors that stand for an engine's ranks, one in each bundle. They stay while lines of processes come and go."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from phalanx.config import ClusterConfig
from phalanx.errors import StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.assignment import PlacedRank, address_of, assign
from phalanx.executor.ray.calls import answers_to, explain
from phalanx.executor.ray.environment import runtime_env
from phalanx.executor.ray.messages import Introduction
from phalanx.executor.ray.niceness import SETTING
from phalanx.executor.ray.rank_actor import MOST_CALLS, RankActor
from phalanx.executor.ray.reservation import Reservation
from phalanx.protocol.client import StartProgress
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Node, Place
from phalanx.transport.address import numeric_address
from phalanx.transport.interfaces import InterfaceAddress, interface_addresses
from phalanx.transport.liveness import Party

ANSWER_S = 5.0
"""For an actor that is there to say so. One that does not is replaced."""

log = logging.getLogger("phalanx.executor")


class RankActors:
    """For one thread at a time, but for `close`. `introduce` before anything else."""

    def __init__(self, cluster: ClusterConfig, grid: Grid, reservation: Reservation, agents: Agents) -> None:
        """Ask Ray for all actors at once; returns before they are there. Raises StartError."""
        self.reservation = reservation
        self.placed: tuple[PlacedRank, ...] = ()
        """Where the ranks are, once their actors have introduced themselves."""
        self.brain_address = ""
        """Where the other nodes reach this one, once the actors have introduced themselves."""
        self.raylet: Party | None = None
        """Ray's own process on this node, once actors on this node have introduced themselves."""
        self.ranks: list[Any] = []  # Ray's handles have the methods of their actors, of which no checker knows
        self.agents: dict[str, Any] = {}
        """By node id."""
        self._cluster = cluster
        self._grid = grid
        self._instance = secrets.token_hex(4)
        self._said: list[Introduction] = []
        try:
            for place in reservation.places:
                self.ranks.append(self._make(place))
            used = dict.fromkeys(place.node_id for place in reservation.places)
            self.agents = agents.of(
                (node_id for node_id in used if not reservation.nodes[node_id].is_driver), self._instance
            )
        except Exception as error:
            self.close()
            raise StartError("an actor", "asking Ray for it", explain(error)) from error

    def introduce(self, on_progress: OnProgress, deadline: Deadline) -> None:
        """Wait for all actors and learn where they are.

        Raises StartError or DeadlineError naming those that do not come; ConfigError, PlacementError.
        """
        places, nodes = self.reservation.places, self.reservation.nodes
        calls: dict[ObjectRef[Any], str] = {}
        for place, actor in zip(places, self.ranks, strict=True):
            on_progress(StartProgress(place.rank, "starting", node=nodes[place.node_id].name))
            calls[actor.introduce.remote()] = self.rank_name(place)
        for node_id, agent in self.agents.items():
            calls[agent.introduce.remote()] = self.agent_name(node_id)
        said = [_decode(answer) for answer in answers_to(calls, "starting", deadline.remaining_s)]
        of_ranks, of_agents = said[: len(places)], said[len(places) :]
        _warn_of_niceness(of_ranks, nodes)
        self._said = [*map(self._with_devices, places, of_ranks), *of_agents]
        self._place()

    def absent(self) -> list[Place]:
        """Those whose actors are not there any more, or do not answer."""
        calls = {
            actor.introduce.remote(): place for actor, place in zip(self.ranks, self.reservation.places, strict=True)
        }
        expires_at = time.monotonic() + ANSWER_S
        found = []
        for call, place in calls.items():
            try:
                ray.get(call, timeout=max(expires_at - time.monotonic(), 0.0))
            except Exception:  # whatever it is, it is of no use
                found.append(place)
        return found

    def dismiss(self, places: Sequence[Place]) -> None:
        """End what may be left of these."""
        for place in places:
            ray.kill(self.ranks[place.rank])

    def replace(self, places: Sequence[Place], deadline: Deadline) -> None:
        """Others in the bundles of these, which are free. Raises as `introduce`, and StartError if a rank is to have
        another device than before, whose memory it would not find."""
        before = self.placed
        for place in places:
            self.ranks[place.rank] = self._make(place)
        calls = {self.ranks[place.rank].introduce.remote(): self.rank_name(place) for place in places}
        try:
            answers = answers_to(calls, "starting", deadline.remaining_s)
        except BaseException:  # later they would be there, and nobody would have asked where
            self.dismiss(places)
            raise
        for place, answer in zip(places, answers, strict=True):
            self._said[place.rank] = self._with_devices(place, _decode(answer))
        self._place()
        for was, now in zip(before, self.placed, strict=True):
            if was.devices != now.devices:
                self.dismiss(places)
                self.placed = before
                cause = f"Ray has given GPU {', '.join(now.devices)} to {now.node}, and it was {', '.join(was.devices)}"
                raise StartError(f"rank {now.rank}", "placing", cause)

    @property
    def driver_node(self) -> Node:
        return _driver_of(self.reservation.nodes)

    @property
    def has_ray(self) -> bool:
        """Whether it can be called. Otherwise it has ended all actors, and a call may hang, or start another Ray."""
        return ray.is_initialized() and (self.raylet is None or self.raylet.is_alive())

    def rank_name(self, place: Place) -> str:
        return f"rank {place.rank} on {self.reservation.nodes[place.node_id].name}"

    def agent_name(self, node_id: str) -> str:
        return f"the agent of node {self.reservation.nodes[node_id].name}"

    def close(self) -> None:
        """End the actors, and with them all processes of all lines; some may take a moment. More than once is fine."""
        if self.has_ray:
            for actor in self.ranks:
                ray.kill(actor)

    def _with_devices(self, place: Place, said: Introduction) -> Introduction:
        """As Ray has given them to the actor that asked for what is in the bundle, whoever's it is."""
        bundle = self.reservation.bundles[place.rank]
        bundle.devices = said.devices or bundle.devices
        return msgspec.structs.replace(said, devices=bundle.devices)

    def _place(self) -> None:
        places, nodes = self.reservation.places, self.reservation.nodes
        of_node = {one.node_id: one.addresses for one in self._said}
        addresses = addresses_of(self._cluster, nodes, {place.node_id: of_node[place.node_id] for place in places})
        self.brain_address = addresses[self.driver_node.node_id]
        for one in self._said:
            if nodes[one.node_id].is_driver:
                self.raylet = Party.of("raylet", one.raylet_pid)
        self.placed = assign(self._grid, places, self._said[: len(places)], nodes, addresses)

    def _make(self, place: Place) -> Any:
        demand, bundle = self.reservation.demand, self.reservation.bundles[place.rank]
        amount = 0 if bundle.is_shared else demand.per_rank
        replica, stage, tp_rank = self._grid.coordinates(place.rank)
        actor: Any = ray.remote(RankActor)
        return actor.options(
            name=f"phalanx-{self._instance}-rank{place.rank}-dp{replica}-pp{stage}-tp{tp_rank}",
            num_cpus=0 if demand.is_device else amount,
            num_gpus=amount if demand.is_device else 0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MOST_CALLS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(bundle.group, bundle.index),
            runtime_env=runtime_env(self._cluster),
        ).remote()


def _decode(answer: bytes) -> Introduction:
    return msgspec.msgpack.decode(answer, type=Introduction)


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


def _warn_of_niceness(said: Sequence[Introduction], nodes: Mapping[str, Node]) -> None:
    for one in {one.node_id: one for one in said if one.nicer_than_raylet > 0}.values():
        log.warning(
            "Ray has the ranks on %s run behind all other processes there (their niceness is %d more than its own): "
            "start it with %s=0",
            nodes[one.node_id].name,
            one.nicer_than_raylet,
            SETTING,
        )


def _driver_of(nodes: Mapping[str, Node]) -> Node:
    return next(node for node in nodes.values() if node.is_driver)
