"""The actors that stand for the nodes beside the driver's, for as long as an engine has ranks there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phalanx.config import ClusterConfig
from phalanx.executor.ray.environment import runtime_env
from phalanx.executor.ray.node_agent import MOST_CALLS, NodeAgent

END_DEADLINE_S = 5.0
"""For an agent to end its node's ranks. The memory of one that does not answer is not trusted."""


class Agents:
    """One for each node that has ranks. They outlive lines, and hold what lines leave to each other.

    For one thread at a time, but for `close`, and `end_ranks` of lines that have been replaced.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = msgspec.structs.replace(cluster, ray_workers_use_nsight=False)
        self._actors: dict[str, Any] = {}  # by node id; Ray's handles have methods of which no checker knows
        self._lost: set[str] = set()

    def of(self, node_ids: Iterable[str], instance: str) -> dict[str, Any]:
        """Those of these nodes, by node id: made, with a name of this `instance`, where there is none yet."""
        return {node_id: self._actors.get(node_id) or self._make(node_id, instance) for node_id in node_ids}

    def living(self, node_id: str) -> Any | None:
        """The node's agent; None if there is none, or it is lost."""
        return None if node_id in self._lost else self._actors.get(node_id)

    def end_ranks(self, epoch: int, node_ids: Iterable[str]) -> None:
        """Have the ranks of a line killed on these nodes, and wait until they are gone.

        An agent that cannot say so is lost from now on. Its ranks end with it.
        """
        actors = {node_id: actor for node_id in node_ids if (actor := self.living(node_id)) is not None}
        calls = {node_id: actor.end_ranks.remote(epoch, END_DEADLINE_S) for node_id, actor in actors.items()}
        expires_at = time.monotonic() + END_DEADLINE_S
        for node_id, call in calls.items():
            try:
                are_gone = ray.get(call, timeout=max(expires_at - time.monotonic(), 0.0))
            except Exception:  # it has died with them, or its node is cut off
                are_gone = False
            if not are_gone and self._actors.get(node_id) is actors[node_id]:  # it may have been replaced meanwhile
                self._lost.add(node_id)

    def renew(self) -> None:
        """End them all: from now on there are none, and others will be made."""
        self.close()
        self._actors.clear()
        self._lost.clear()

    def close(self) -> None:
        """End them. May be called more than once."""
        for actor in list(self._actors.values()):
            ray.kill(actor)

    def _make(self, node_id: str, instance: str) -> Any:
        actor: Any = ray.remote(NodeAgent)
        self._actors[node_id] = made = actor.options(
            name=f"phalanx-{instance}-agent-{node_id[:8]}",
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=MOST_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env=runtime_env(self._cluster),
        ).remote()
        return made


def kill_ranks(agents: Mapping[str, Any], epoch: int) -> None:
    """Have them killed on all nodes; returns at once. For any thread."""
    for actor in agents.values():
        actor.end_ranks.remote(epoch, 0.0)
