"""Whether there is room for more replicas of a fleet: on this host, or on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from phalanx.engine.census import Census
from phalanx.engine.joining import Joining
from phalanx.errors import ConfigError, DeadlineError, RequestError, ResizeRefusedError, StartError
from phalanx.memory.shared_weights import resident_bytes
from phalanx.topology.apart import Fit, Wanted, fit_apart
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Demand, Node, avoiding


class Room:
    """For one event loop. What it says is a moment old: the start of a replica finds out whether it is still so."""

    def __init__(self, joining: Joining, census: Census) -> None:
        """`joining` knows what a replica is like."""
        self._joining = joining
        self._census = census

    async def check(self, size: int, numbers: Sequence[int], pids: Sequence[int]) -> None:
        """Whether replicas with the new `numbers` may join, so that there are `size`. Takes a second or two.

        `pids` are the engines that run. Raises ConfigError that says what is missing, and where; ResizeRefusedError if
        Ray's head cannot be asked.
        """
        if not numbers:
            return
        self._joining.seats.check_size(size)
        nodes = await self._nodes()
        if nodes is None:
            shared_bytes = resident_bytes(await self._joining.find_weights())
            await asyncio.to_thread(self._joining.seats.check_host, size, numbers, pids, shared_bytes)
        elif (complaint := self._fit(size, numbers, nodes).complaint) is not None:
            raise ConfigError("data_parallel_size", size, complaint)

    async def fit(self, size: int, numbers: Sequence[int]) -> Fit:
        """For how many of these replicas a Ray cluster has room. Raises as `check`."""
        nodes = await self._nodes()
        if nodes is None:
            return Fit(0, "there is no other node than this host")
        return self._fit(size, numbers, nodes)

    async def complaint_about(self, number: int, size: int) -> str | None:
        """Why a replica that has ended has no place any more; None if it has one. Raises as `check`."""
        nodes = await self._nodes()
        if nodes is None:
            return self._joining.seats.complaint_about(number)
        return self._fit(max(size, number + 1), (number,), nodes).complaint

    async def node_called(self, name: str) -> Node:
        """The one that a user means. Raises RequestError if there is none; else as `check`."""
        nodes = await self._nodes()
        if nodes is None:
            raise RequestError("node", name, "all ranks are on this host: it takes launcher ray, and a cluster")
        meant = [node for node in nodes if node.is_called(name)]
        if not meant:
            known = ", ".join(sorted(f"{node.name} ({node.address})" for node in nodes))
            raise RequestError("node", name, f"the cluster has {known}")
        return meant[0]

    async def close(self) -> None:
        """Keep no process for it."""
        await self._census.close()

    async def _nodes(self) -> Sequence[Node] | None:
        """None where there is no cluster. Raises ResizeRefusedError."""
        if self._joining.config.executor.launcher != "ray":
            return None
        try:
            return await self._census.nodes(self._demand.resource)
        except (StartError, DeadlineError) as error:
            raise ResizeRefusedError(f"what the nodes have free cannot be told: {error}") from error

    @property
    def _demand(self) -> Demand:
        device = "cpu" if self._joining.info.device == "cpu" else "cuda"  # of GPUs it has the name
        return Demand.on(device, self._joining.config.cluster.ray_per_worker_gpus)

    def _fit(self, size: int, numbers: Sequence[int], nodes: Sequence[Node]) -> Fit:
        joining, cluster = self._joining, self._joining.config.cluster
        own = [joining.seats.settings(number, size, joining.info.max_model_len)[0].parallel for number in numbers]
        wanted = [Wanted(Grid.of(parallel), parallel.data_parallel_size_local) for parallel in own]
        usable = avoiding(nodes, cluster.avoid_nodes)
        return fit_apart(wanted, self._demand, usable, may_split=cluster.allow_split_tensor_parallel)
