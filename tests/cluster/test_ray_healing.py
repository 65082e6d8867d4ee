"""Ranks, agents and nodes of a cluster are killed one after the other: streams go on, as long as there is room."""

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
HEAL_TIMEOUT_S = 40.0
ENDED_WITHIN_S = 10.0
FLAGS = ("--pipeline-parallel-size", "2", "--ray-per-worker-gpus", "2", "--heal-timeout-s", str(HEAL_TIMEOUT_S))
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


def streamed_while_dies(victim: str, cluster: RayCluster, server: ClusterServer) -> tuple[list[str], str | None]:
    """The tokens of a stream, and the error that ended it, if one did. The victim is a process on rank 1's node."""
    names: list[str] = []
    host = cluster.hosts[server.node_of(1)]
    with server.stream(PROMPT, NUM_TOKENS) as events:
        for event in events:
            if "error" in event:
                return names, str(event["error"]["message"])
            before, names = len(names), names + event["choices"][0]["logprobs"]["tokens"]
            if before < NUM_TOKENS // 10 <= len(names):
                (process,) = (p for p in host.processes() if Path(p.cmdline()[0]).name.startswith(victim))
                process.kill()
    return names, None


def healed(server: ClusterServer) -> dict[str, int]:
    """How often, by rung."""
    found = re.findall(r'phalanx_healing_tries_total{.*outcome="healed",rung="(.*)"} (.*)', server.metrics())
    return {rung: int(float(count)) for rung, count in found}


def test_a_rank_its_agent_its_node_and_the_next_node(
    cluster: RayCluster, checkpoint: Path, expected: Tokens, tmp_path: Path
) -> None:
    with ClusterServer(cluster, checkpoint, tmp_path / "log", *FLAGS) as server:
        server.await_ready()
        first = server.node_of(1)
        for victim, by in (
            ("ray::RankActor", {"new line": 1}),
            ("ray::NodeAgent", {"new line": 1, "checkpoint": 1}),
            ("raylet", {"new line": 1, "checkpoint": 2}),
        ):
            assert streamed_while_dies(victim, cluster, server) == (expected.names, None), server.log
            assert healed(server) == by, server.log
        second = server.node_of(1)
        assert first != second, server.log
        began_at = time.monotonic()
        names, error = streamed_while_dies("raylet", cluster, server)
        assert time.monotonic() - began_at < HEAL_TIMEOUT_S + ENDED_WITHIN_S
        assert names == expected.names[: len(names)], server.log
        assert error is not None and f"rank 1 on {second}" in error, error
        assert "there was no other place" in error, error
        assert server.process.wait(ENDED_WITHIN_S) == 1, server.log
    cluster.expect_clean(ENDED_WITHIN_S)
