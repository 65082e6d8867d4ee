"""What the ranks of an engine have of Ray, one line of them after the other: the connection, a bundle for each rank,
and the agents of the other nodes."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import msgspec
import ray

from phalanx.config import Config
from phalanx.errors import DeadlineError, PlacementError, StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.platform import torch_has_cuda
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.connection import Connection, connect
from phalanx.executor.ray.crew import Crew
from phalanx.executor.ray.holding import NodesHolder
from phalanx.executor.ray.probe import is_gone
from phalanx.executor.ray.reservation import Reservation, busy_places, reserve
from phalanx.protocol import StartProgress
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Place, split_groups

POLL_S = 0.02
MOVE_POLL_S = 0.25
"""Between two looks for room: each asks Ray for all nodes."""

log = logging.getLogger("phalanx.executor")


class Quarters:
    """For one thread at a time, but for `vacate`. A context manager."""

    def __init__(self, config: Config, on_progress: OnProgress) -> None:
        """Connect to Ray and find a bundle for each rank. Raises ConfigError, PlacementError, StartError."""
        self._grid = Grid.of(config.parallel)
        self._line: Crew | None = None
        self._is_vacated = False
        self.lacks_room: str | None = None
        """What is missing for the ranks of a lost node, while room for them is waited for. For any thread."""
        for rank in range(self._grid.world_size):
            on_progress(StartProgress(rank, "placing"))
        with ExitStack() as stack:
            self._connection = stack.enter_context(connect(config.cluster, num_ranks=self._grid.world_size))
            device = _pick_device(config, self._connection)
            executor = msgspec.structs.replace(config.executor, device=device)
            self.config = msgspec.structs.replace(config, executor=executor)
            """With its device settled."""
            self.config.check()
            self._bundles = stack.enter_context(ExitStack())
            self.reservation = self._reserve()
            self.agents = Agents(config.cluster)
            stack.callback(self._end_agents)
            self._resources = stack.pop_all()

    def hire(
        self, checkpoint: str, epoch: int, on_progress: OnProgress, deadline: Deadline, *, has_memory: bool = False
    ) -> Crew:
        """Actors for the line of this epoch, which have introduced themselves; their owner closes them.

        With `has_memory` they come to where the ones before them were, whose memory is there; otherwise also to other
        nodes, if some are lost. Raises StartError or DeadlineError naming ranks and nodes; ConfigError, PlacementError.
        """
        if self._line is not None:
            self._make_ready(deadline, may_move=not has_memory)
        if not has_memory:  # whatever was wrong with them
            self.agents.renew()
        self._line = crew = Crew(self.config, self._grid, checkpoint, self.reservation, self.agents, epoch, deadline)
        try:
            self._check_open()
            crew.introduce(on_progress)
        except BaseException:
            crew.close()
            raise
        return crew

    def holder(self) -> NodesHolder:
        """For the memory that lines leave to each other."""
        return NodesHolder(self)

    @property
    def crew(self) -> Crew:
        """The line that was hired last."""
        assert self._line is not None
        return self._line

    @property
    def has_ray(self) -> bool:
        """Whether it can be called. Otherwise it has ended all actors, and a call may hang, or start another Ray."""
        return self._line.has_ray if self._line is not None else ray.is_initialized()

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Ranks that are placed from now on are to come to other nodes than these. For any thread."""
        cluster = msgspec.structs.replace(self.config.cluster, avoid_nodes=nodes)
        self.config = msgspec.structs.replace(self.config, cluster=cluster)

    def vacate(self) -> None:
        """Have what is under way here fail, and nobody come any more. For any thread."""
        self._is_vacated = True
        if (crew := self._line) is not None:
            crew.close()
        self._end_agents()

    def close(self) -> None:
        """End the agents and give everything back to Ray. The ranks are gone."""
        self._resources.close()

    def __enter__(self) -> Quarters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_ready(self, deadline: Deadline, *, may_move: bool) -> None:
        """Wait until the ranks before have given back their bundles, or move to other nodes."""
        self._check_ray()
        while True:
            self._check_open()
            if lost := self._lost_places():
                if not may_move:
                    raise StartError(self._named(lost), "placing", "a lost node has taken its memory along")
                self._move(lost, deadline)
                return
            busy = busy_places(self._connection, self.reservation)
            if not busy:
                return
            if not deadline.remaining_s:
                raise DeadlineError("bundles to be free", self._named(busy), deadline.waited_s)
            time.sleep(POLL_S)

    def _check_ray(self) -> None:
        """Its calls hang, or end this process, if the processes are gone that answer them."""
        if not self.has_ray:
            raise StartError("a line", "placing", "the raylet of the engine's node has ended")
        head = ray.get_runtime_context().gcs_address
        if is_gone(head):
            raise StartError("a line", "placing", f"Ray's head at {head} is gone")

    def _lost_places(self) -> list[Place]:
        alive = {node.node_id for node in self._connection.nodes(self.reservation.demand.resource)}
        return [place for place in self.reservation.places if place.node_id not in alive]

    def _move(self, lost: list[Place], deadline: Deadline) -> None:
        """Bundles on nodes that live: at once if there is room, or as soon as there is."""
        where = self._named(lost)
        log.warning("lost: %s; the ranks are placed anew", where)
        self._bundles.close()
        while True:
            self._check_open()
            try:
                self.reservation = self._reserve()
                self.lacks_room = None
                return
            except PlacementError as error:
                self.lacks_room = f"lost: {where}: {error.complaint}"
                if not deadline.remaining_s:
                    complaint = f"no other place in {deadline.waited_s:.3g} s for what was on a lost node"
                    cause = f"{complaint}: {error.complaint}"
                    raise StartError(where, "placing", cause) from error
            time.sleep(min(MOVE_POLL_S, deadline.remaining_s))

    def _reserve(self) -> Reservation:
        reservation = reserve(
            self._connection, self.config, self._grid, self.config.executor.device, ownership=self._bundles
        )
        for group in split_groups(self._grid, reservation.places):
            log.warning(
                "the tensor-parallel group %s is on several nodes: its ranks meet over the network twice in every "
                "layer, so that a step takes many times as long",
                group,
            )
        return reservation

    def _end_agents(self) -> None:
        if self.has_ray:
            self.agents.close()

    def _check_open(self) -> None:
        if self._is_vacated:
            raise StartError("a line", "placing", "the engine ends")

    def _named(self, places: list[Place]) -> str:
        nodes = self.reservation.nodes
        return ", ".join(f"rank {place.rank} on {nodes[place.node_id].name}" for place in places)


def _pick_device(config: Config, connection: Connection) -> str:
    if config.executor.device != "auto":
        return config.executor.device
    has_gpus = any(node.total > 0 for node in connection.nodes("GPU"))
    return "cuda" if has_gpus and torch_has_cuda() else "cpu"
