"""Replicas on nodes that come and go: a node that joins later takes what another one is drained of, and is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster_server import ClusterServer
from one_process import Tokens, tokens_of_one_process
from ray_cluster import RayCluster, command_of

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = ([72, 101, 108, 108, 111], list(range(60, 90)))
NUM_TOKENS = 60
SO_WITHIN_S = 60.0
GONE_WITHIN_S = 5.0
FLAGS = ("--data-parallel-size", "2", "--ray-per-worker-gpus", "2", "--auto-grow")
"""A replica is one rank, which takes a whole node."""


@pytest.fixture
def cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """Without its third node, which a test may let join."""
    lose_node(ray_cluster, "gamma")
    yield ray_cluster
    ray_cluster.heal()


def lose_node(cluster: RayCluster, node: str) -> None:
    """As Ray knows at once; after a SIGKILL it takes its time to find out."""
    raylet = cluster.raylet(cluster.hosts[node])
    assert raylet is not None
    raylet.terminate()
    raylet.wait(SO_WITHIN_S)


def ranks_on(cluster: RayCluster) -> list[str]:
    """The node of each rank that there is."""
    return [
        name
        for name, host in cluster.hosts.items()
        for process in host.processes()
        if command_of(process).startswith("ray::RankActor")
    ]


def until(condition: Callable[[], bool], server: ClusterServer) -> None:
    expires_at = time.monotonic() + SO_WITHIN_S
    while not condition():
        assert time.monotonic() < expires_at, server.log
        time.sleep(0.05)


@contextmanager
def clients(server: ClusterServer, expected: list[Tokens]) -> Iterator[None]:
    """Some that ask again and again meanwhile, and always get the right tokens."""
    stop = threading.Event()

    def ask(index: int) -> int:
        count = 0
        while not stop.is_set():
            assert server.complete(PROMPTS[index], NUM_TOKENS) == expected[index].names
            count += 1
        return count

    with ThreadPoolExecutor(len(PROMPTS)) as asking:
        counts = [asking.submit(ask, index) for index in range(len(PROMPTS))]
        try:
            yield
        finally:
            stop.set()
        assert all(count.result() > 0 for count in counts)


def test_a_node_joins_another_is_drained_and_one_is_lost(cluster: RayCluster, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "llama")
    expected = tokens_of_one_process(checkpoint, list(PROMPTS), NUM_TOKENS)
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *FLAGS) as server:
        server.await_ready()
        refused = server.change("/scale", data_parallel_size=3)
        assert refused.status_code == 400
        assert "CPU free: alpha 0 of 2, beta 0 of 2" in refused.json()["error"]["message"], refused.text
        assert ranks_on(cluster) == ["alpha", "beta"]
        with clients(server, expected):
            cluster.heal()  # gamma joins
            assert server.change("/drain", node="beta", drain_timeout_s=0).status_code == 202
            drained = server.await_change()
            assert (drained["state"], drained["data_parallel_size"]) == ("done", 2), server.log
            until(lambda: ranks_on(cluster) == ["alpha", "gamma"], server)
            lose_node(cluster, "gamma")
            until(lambda: server.scale()["strength"]["num_missing"] == 1, server)
            found = server.scale()
            assert [one["replica"] for one in found["replicas"] if one["state"] == "serving"] == [0]
            assert "the cluster has room for 0" in found["strength"]["missing_because"]
            assert server.change("/drain", node="beta", undo=True).status_code == 202
            until(lambda: server.scale()["strength"]["num_grown"] == 1, server)
            until(lambda: ranks_on(cluster) == ["alpha", "beta"], server)
        assert "phalanx_replicas_grown_total 1.0" in server.metrics()
        assert server.stop() == 0, server.log
    cluster.expect_clean(GONE_WITHIN_S)
