"""Nodes that are cut off, and processes that are killed on them: the run ends in time, in an error that says which node
and rank it was and what was awaited, and nothing is left on any host.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster_server import ClusterServer
from hosts import Direction
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPT = [72, 101, 108, 108, 111]
ENDLESS = 16_000
NODE_TIMEOUT_S = 3.0
NOTICED_WITHIN_S = 2.0
"""From a death, or the end of a deadline, to the error at the client."""
ENDED_WITHIN_S = 10.0
GONE_WITHIN_S = 5.0

HEAL_TIMEOUT_S = 2.0
"""Less than Ray takes to find that a node is gone, or a line to come up."""

FLAGS = ("--node-timeout-s", str(NODE_TIMEOUT_S), "--ray-per-worker-gpus", "2")
PIPELINE_THAT_HEALS = ("--pipeline-parallel-size", "2", *FLAGS, "--heal-timeout-s", str(HEAL_TIMEOUT_S))
PIPELINE_PARALLEL = ("--pipeline-parallel-size", "2", *FLAGS, "--no-heal")
TENSOR_PARALLEL = ("--tensor-parallel-size", "2", "--allow-split-tensor-parallel", *FLAGS, "--no-heal")
"""Rank 0 is beside the brain, rank 1 on another node."""

Fault = Callable[[RayCluster, str], AbstractContextManager[None]]
"""Befalls the node of this name."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), max_position_embeddings=16_384)


@pytest.fixture
def cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    yield ray_cluster
    ray_cluster.heal()


def link_down(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return cluster.cables[node].cut()


def no_way_from_it(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return cluster.cables[node].impaired(sent=Direction(loss=1.0))


def no_way_to_it(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return cluster.cables[node].impaired(received=Direction(loss=1.0))


def raylet_killed(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return killed(cluster, node, "raylet")


def rank_killed(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return killed(cluster, node, "ray::RankActor")


def relay_killed(cluster: RayCluster, node: str) -> AbstractContextManager[None]:
    return killed(cluster, node, "ray::NodeAgent")


def killed(cluster: RayCluster, node: str, name: str) -> AbstractContextManager[None]:
    (process,) = (p for p in cluster.hosts[node].processes() if Path(p.cmdline()[0]).name.startswith(name))
    process.kill()
    return nullcontext()


@pytest.mark.parametrize(
    ("flags", "fault", "deadline_s"),
    [
        (TENSOR_PARALLEL, link_down, NODE_TIMEOUT_S),
        (PIPELINE_PARALLEL, no_way_from_it, NODE_TIMEOUT_S),
        (PIPELINE_PARALLEL, no_way_to_it, NODE_TIMEOUT_S),
        (TENSOR_PARALLEL, raylet_killed, 0.0),
        (TENSOR_PARALLEL, rank_killed, 0.0),
        (PIPELINE_PARALLEL, relay_killed, 0.0),
        (PIPELINE_THAT_HEALS, raylet_killed, HEAL_TIMEOUT_S),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_error_names_the_node_and_nothing_is_left(
    cluster: RayCluster, checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], fault: Fault, deadline_s: float
) -> None:
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *flags) as server:
        server.await_ready()
        with server.stream(PROMPT, ENDLESS) as events:
            await_tokens(events)
            node = server.node_of(1)
            with fault(cluster, node):
                start = time.monotonic()
                message = error_of(events)
                noticed_after_s = time.monotonic() - start
                assert server.process.wait(ENDED_WITHIN_S) == 1, server.log
                cluster.expect_clean(GONE_WITHIN_S)
    assert "rank 1" in message, server.log
    assert node in message, server.log
    assert noticed_after_s < deadline_s + NOTICED_WITHIN_S


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_sigkill_of_the_driver_leaves_nothing(
    cluster: RayCluster, checkpoint: Path, tmp_path: Path, victim: str
) -> None:
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *PIPELINE_PARALLEL) as server:
        server.await_ready()
        with server.stream(PROMPT, ENDLESS) as events:
            await_tokens(events)
            process = psutil.Process(server.process.pid)
            (process if victim == "server" else process.children()[0]).kill()
        server.process.wait(ENDED_WITHIN_S)
        cluster.expect_clean(GONE_WITHIN_S)


def test_sigkill_during_the_start_leaves_nothing(cluster: RayCluster, checkpoint: Path, tmp_path: Path) -> None:
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *TENSOR_PARALLEL) as server:
        time.sleep(random.uniform(0.5, 8.0))  # any moment of the start will do
        server.process.end()
        cluster.expect_clean(GONE_WITHIN_S)


def await_tokens(events: Iterator[dict[str, Any]]) -> None:
    for _ in range(10):
        assert "error" not in next(events)


def error_of(events: Iterator[dict[str, Any]]) -> str:
    """The message that ends the stream."""
    for event in events:
        if "error" in event:
            return str(event["error"]["message"])
    raise AssertionError("the stream ended without an error")
