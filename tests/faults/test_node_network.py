"""Troubles of the network between nodes that a run must live through, with the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_server import ClusterServer
from hosts import Direction
from one_process import Tokens, tokens_of_one_process
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPT = [72, 101, 108, 108, 111]
NUM_TOKENS = 400
NODE_TIMEOUT_S = 3.0
FLAGS = ("--tensor-parallel-size", "2", "--allow-split-tensor-parallel", "--ray-per-worker-gpus", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tokens:
    return tokens_of_one_process(checkpoint, [PROMPT], NUM_TOKENS)[0]


@pytest.fixture(scope="module")
def server(
    ray_cluster: RayCluster, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterServer]:
    """Rank 0 is beside the brain, rank 1 on another node: they meet over the network in every layer."""
    log = tmp_path_factory.mktemp("server") / "log"
    with ClusterServer(ray_cluster, checkpoint, log, *FLAGS, "--node-timeout-s", str(NODE_TIMEOUT_S)) as server:
        server.await_ready()
        yield server
        assert server.stop() == 0, server.log
    ray_cluster.heal()


def test_delay_and_loss_only_slow_it_down(ray_cluster: RayCluster, server: ClusterServer, expected: Tokens) -> None:
    with ray_cluster.cables[server.node_of(1)].impaired(sent=Direction(0.2, 0.05), received=Direction(0.0, 0.05)):
        assert server.complete(PROMPT, 6) == expected.names[:6]


def test_a_stall_shorter_than_the_deadline(ray_cluster: RayCluster, server: ClusterServer, expected: Tokens) -> None:
    names: list[str] = []
    is_cut = False
    with server.stream(PROMPT, NUM_TOKENS) as events:
        for event in events:
            assert "error" not in event, f"{event}\n{server.log}"
            names += [name for choice in event["choices"] for name in choice["logprobs"]["tokens"]]
            if len(names) >= NUM_TOKENS // 20 and not is_cut:
                is_cut = True
                with ray_cluster.cables[server.node_of(1)].cut():
                    time.sleep(NODE_TIMEOUT_S / 2)
    assert is_cut
    assert names == expected.names
    assert "are ended" not in server.log, "it was survived, not healed"
