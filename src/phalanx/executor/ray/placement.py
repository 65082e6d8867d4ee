"""What the ranks of an engine have of Ray, whatever line they are of: the connection, a bundle for each rank with an
actor in it, and the agents of the other nodes. Lines of another grid have a placement of their own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import ray

from phalanx.config import Config
from phalanx.errors import DeadlineError, PlacementError, StartError
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.platform import torch_has_cuda
from phalanx.executor.ray.agents import Agents
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.connection import Connection, connect
from phalanx.executor.ray.holding import NodesHolder
from phalanx.executor.ray.line_processes import LineProcesses
from phalanx.executor.ray.probe import is_gone
from phalanx.executor.ray.rank_actors import RankActors
from phalanx.executor.ray.reservation import Reservation, busy_places, reserve
from phalanx.executor.ray.shared_bundle import SharedBundle
from phalanx.protocol.client import StartProgress
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Place, split_groups

POLL_S = 0.02
MOVE_POLL_S = 0.25
"""Between two looks for room: each asks Ray for all nodes."""

LACKS_ROOM_AFTER_S = 1.0
"""Of looks in vain: Ray takes a moment to give back bundles, those that were just let go of as well."""

log = logging.getLogger("phalanx.executor")


class RayPlacement:
    """`make_processes`, `kill` and `avoid` are for any thread, all else for who closes it. A context manager."""

    def __init__(
        self, config: Config, on_progress: OnProgress, *, beside: Sequence[SharedBundle] = (), shares: bool = True
    ) -> None:
        """Connect to Ray and find a bundle for each rank. Raises ConfigError, PlacementError, StartError.

        `beside` and `shares` are as for `reserve`.
        """
        self._grid = Grid.of(config.parallel)
        self._actors: RankActors | None = None
        self._making = threading.Lock()
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
            self.reservation = self._reserve(beside, shares)
            self.agents = Agents(config.cluster)
            stack.callback(self._end_actors)
            self._resources = stack.pop_all()

    def make_processes(
        self,
        checkpoint: str,
        epoch: int,
        on_progress: OnProgress,
        deadline: Deadline,
        *,
        has_memory: bool = False,
        is_beside: bool = False,
        note: Callable[[LineProcesses], None] = lambda processes: None,
    ) -> LineProcesses:
        """A process for each rank of the line of this epoch; their owner kills them. `note` is told before they come.

        With `has_memory` they come to where the ones before them were, whose memory is there; otherwise to new actors,
        also on other nodes, if some are lost. `is_beside`: another line computes meanwhile, and nothing is changed of
        where ranks are. Raises StartError or DeadlineError naming ranks and nodes; ConfigError, PlacementError.
        """
        with self._changing(deadline, is_beside):
            if is_beside:
                self._check_actors()
            else:
                self._settle(on_progress, deadline, has_memory)
            processes = LineProcesses(self.config, self.actors, self.agents, checkpoint, epoch, deadline)
        try:
            note(processes)
            self._check_open()
            processes.make()
        except BaseException:
            processes.kill()
            raise
        return processes

    def survey(self, on_progress: OnProgress, deadline: Deadline) -> tuple[PlacedRank, ...]:
        """Where ranks would be. Raises as `make_processes`."""
        self._settle(on_progress, deadline, has_memory=False)
        return self.actors.placed

    def holder(self) -> NodesHolder:
        """For the memory that lines leave to each other."""
        return NodesHolder(self)

    @property
    def actors(self) -> RankActors:
        """The actors of the ranks, by now."""
        assert self._actors is not None
        return self._actors

    @property
    def has_ray(self) -> bool:
        """Whether it can be called. Otherwise it has ended all actors, and a call may hang, or start another Ray."""
        return self._actors.has_ray if self._actors is not None else ray.is_initialized()

    @property
    def avoided(self) -> tuple[str, ...]:
        """Names of nodes that no rank is to come to from now on."""
        return self.config.cluster.avoid_nodes

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Ranks that are placed from now on are to come to other nodes than these."""
        cluster = msgspec.structs.replace(self.config.cluster, avoid_nodes=nodes)
        self.config = msgspec.structs.replace(self.config, cluster=cluster)

    def kill(self) -> None:
        """Have all ranks of all lines killed, and what is under way here fail; nobody comes any more."""
        self._is_vacated = True
        self._end_actors()

    def close(self) -> None:
        """End the actors and give everything back to Ray. The ranks are gone."""
        self._resources.close()

    def __enter__(self) -> RayPlacement:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _changing(self, deadline: Deadline, is_beside: bool) -> Iterator[None]:
        """While ranks get other places nobody is hired beside them, who would have to wait for that."""
        if not self._making.acquire(timeout=0.0 if is_beside else deadline.remaining_s):
            raise StartError("a line", "placing", "ranks are just getting their places")
        try:
            yield
        finally:
            self._making.release()

    def _settle(self, on_progress: OnProgress, deadline: Deadline, has_memory: bool) -> None:
        """An actor for each rank."""
        if self._actors is None:
            self._open(on_progress, deadline)
            return
        self._check_ray()
        if has_memory:
            self._complete(self._actors, deadline)
            return
        self._actors.close()  # whatever was wrong with them
        self.agents.renew()
        if lost := self._lost_places():
            self._move(lost, deadline)
        else:
            self._await_bundles(self.reservation.places, deadline)
        self._open(on_progress, deadline)

    def _open(self, on_progress: OnProgress, deadline: Deadline) -> None:
        self._check_open()
        self._actors = actors = RankActors(self.config.cluster, self._grid, self.reservation, self.agents)
        try:
            self._check_open()
            actors.introduce(on_progress, deadline)
        except BaseException:
            actors.close()
            raise

    def _complete(self, actors: RankActors, deadline: Deadline) -> None:
        """Others for the actors that are gone, where they were."""
        if lost := self._lost_places():
            raise StartError(self._named(lost), "placing", "a lost node has taken its memory along")
        if absent := actors.absent():
            log.warning("actors are gone, and others are asked for: %s", self._named(absent))
            actors.dismiss(absent)
            self._await_bundles(absent, deadline)
            actors.replace(absent, deadline)

    def _check_actors(self) -> None:
        self._check_open()
        self._check_ray()
        if absent := self.actors.absent():
            raise StartError(self._named(absent), "placing", "its actor is gone")

    def _await_bundles(self, places: Sequence[Place], deadline: Deadline) -> None:
        """Wait until those who had these bundles have given them back."""
        while True:
            self._check_open()
            busy = [place for place in busy_places(self._connection, self.reservation) if place in places]
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
        told_at = time.monotonic() + LACKS_ROOM_AFTER_S
        while True:
            self._check_open()
            try:
                self.reservation = self._reserve()
                self.lacks_room = None
                return
            except PlacementError as error:
                if time.monotonic() >= told_at:
                    self.lacks_room = f"lost: {where}: {error.complaint}"
                if not deadline.remaining_s:
                    complaint = f"no other place in {deadline.waited_s:.3g} s for what was on a lost node"
                    cause = f"{complaint}: {error.complaint}"
                    raise StartError(where, "placing", cause) from error
            time.sleep(min(MOVE_POLL_S, deadline.remaining_s))

    def _reserve(self, beside: Sequence[SharedBundle] = (), shares: bool = True) -> Reservation:
        device = self.config.executor.device
        reservation = reserve(
            self._connection, self.config, self._grid, device, self._bundles, beside=beside, shares=shares
        )
        for group in split_groups(self._grid, reservation.places):
            log.warning(
                "the tensor-parallel group %s is on several nodes: its ranks meet over the network twice in every "
                "layer, so that a step takes many times as long",
                group,
            )
        return reservation

    def _end_actors(self) -> None:
        if self.has_ray:
            if self._actors is not None:
                self._actors.close()
            self.agents.close()

    def _check_open(self) -> None:
        if self._is_vacated:
            raise StartError("a line", "placing", "the engine ends")

    def _named(self, places: Sequence[Place]) -> str:
        nodes = self.reservation.nodes
        return ", ".join(f"rank {place.rank} on {nodes[place.node_id].name}" for place in places)


def _pick_device(config: Config, connection: Connection) -> str:
    if config.executor.device != "auto":
        return config.executor.device
    has_gpus = any(node.total > 0 for node in connection.nodes("GPU"))
    return "cuda" if has_gpus and torch_has_cuda() else "cpu"
