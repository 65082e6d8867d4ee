"""A rank on another node is killed, and then that node is lost: streams go on, by the line that stands ready there, and
then elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_server import ClusterServer
from one_process import Tokens, tokens_of_one_process
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPT = [72, 101, 108, 108, 111]
NUM_TOKENS = 200
GONE_WITHIN_S = 5.0
READY_WITHIN_S = 30.0
FLAGS = ("--pipeline-parallel-size", "2", "--ray-per-worker-gpus", "2", "--standby", "1")
"""Each rank has a node of its own, rank 0 the brain's; one node is left over."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tokens:
    return tokens_of_one_process(checkpoint, [PROMPT], NUM_TOKENS)[0]


@pytest.fixture
def cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    yield ray_cluster
    ray_cluster.heal()


def kill_rank(cluster: RayCluster, node: str) -> None:
    """The older one: the other one stands ready."""
    _, rank = sorted(cluster.ranks(cluster.hosts[node]), key=lambda rank: -rank.create_time())
    rank.kill()


def lose_node(cluster: RayCluster, node: str) -> None:
    """As Ray knows at once; after a SIGKILL it takes its time to find out."""
    raylet = cluster.raylet(cluster.hosts[node])
    assert raylet is not None
    raylet.terminate()


def healed(server: ClusterServer) -> dict[str, int]:
    """How often, by rung."""
    found = re.findall(r'phalanx_healing_tries_total{.*outcome="healed",rung="(.*)"} (.*)', server.metrics())
    return {rung: int(float(count)) for rung, count in found}


def await_standby(server: ClusterServer) -> None:
    expires_at = time.monotonic() + READY_WITHIN_S
    while not re.search(r"phalanx_standby_ready{.*} 1", server.metrics()):
        assert time.monotonic() < expires_at, server.log
        time.sleep(0.05)


def test_streams_go_on(cluster: RayCluster, checkpoint: Path, expected: Tokens, tmp_path: Path) -> None:
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *FLAGS) as server:
        server.await_ready()
        first = server.node_of(1)
        for harm, by in ((kill_rank, {"standby": 1}), (lose_node, {"standby": 1, "checkpoint": 1})):
            await_standby(server)
            names: list[str] = []
            with server.stream(PROMPT, NUM_TOKENS) as events:
                for event in events:
                    assert "error" not in event, f"{event}\n{server.log}"
                    before, names = len(names), names + event["choices"][0]["logprobs"]["tokens"]
                    if before < NUM_TOKENS // 10 <= len(names):
                        harm(cluster, server.node_of(1))
            assert names == expected.names, server.log
            assert healed(server) == by, server.log
        assert server.node_of(1) != first, server.log
        assert server.stop() == 0, server.log
    cluster.expect_clean(GONE_WITHIN_S)
