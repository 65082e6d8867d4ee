"""Replicas over several real Ray nodes: in lockstep and sharing experts, or each an engine of its own."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from cluster_server import ClusterServer
from one_process import Tokens, tokens_of_one_process
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = [[72, 101, 108, 108, 111], list(range(60, 130)), [5], list(range(7, 47))]
NUM_TOKENS = 16
CLEAN_WITHIN_S = 5.0
TOLD_WITHIN_S = 5.0
TWO_OF_TWO = ("--tensor-parallel-size", "2", "--data-parallel-size", "2")
"""A node has two of Ray's CPUs: it holds one replica."""


def expect_tokens(server: ClusterServer, expected: Sequence[Tokens]) -> None:
    """All prompts at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = clients.map(lambda prompt: server.complete(prompt, NUM_TOKENS), PROMPTS)
        assert list(answers) == [tokens.names for tokens in expected]


def expect_work_of_both(server: ClusterServer) -> None:
    expires_at = time.monotonic() + TOLD_WITHIN_S
    while True:
        steps = dict(re.findall(r'^phalanx_engine_steps_total\{replica="(\d)"\} (\S+)', server.metrics(), re.MULTILINE))
        assert set(steps) == {"0", "1"}
        if all(float(count) > 0 for count in steps.values()):
            return
        assert time.monotonic() < expires_at, steps
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("backend", "flags", "nodes"),
    [
        ("allgather_reducescatter", (), ["alpha", "alpha", "beta", "beta"]),
        ("alltoall", ("--data-parallel-size-local", "0"), ["beta", "beta", "gamma", "gamma"]),
    ],
)
def test_experts_shared_out_over_nodes(
    ray_cluster: RayCluster, tmp_path: Path, backend: str, flags: tuple[str, ...], nodes: list[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "mixtral", "mixtral", num_local_experts=7)
    expected = tokens_of_one_process(checkpoint, PROMPTS, NUM_TOKENS)
    flags = (*TWO_OF_TWO, "--enable-expert-parallel", "--all2all-backend", backend, *flags)
    with ClusterServer(ray_cluster, checkpoint, tmp_path / "log", *flags) as server:
        server.await_ready()
        assert [server.node_of(rank) for rank in range(4)] == nodes
        expect_tokens(server, expected)
        expect_work_of_both(server)
        assert server.stop() == 0, server.log
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


def test_replicas_that_run_apart(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Each finds its own place; what one suffers is not the other's."""
    checkpoint = write_checkpoint(tmp_path / "llama")
    expected = tokens_of_one_process(checkpoint, PROMPTS, NUM_TOKENS)
    with ClusterServer(ray_cluster, checkpoint, tmp_path / "log", *TWO_OF_TWO, "--no-heal") as server:
        server.await_ready()
        placed = set(re.findall(r"rank (\d) is on (\w+)", server.log))  # each engine places its own, at the same time
        assert placed == {(rank, node) for node in ("alpha", "beta") for rank in "01"}
        assert "is on several nodes" not in server.log
        expect_tokens(server, expected)
        expect_work_of_both(server)
        _kill_a_rank(ray_cluster, "beta")
        server.await_log(" has ended, 1 of 2 go on: rank ")
        expect_tokens(server, expected)
        assert server.stop() == 0, server.log
    ray_cluster.expect_clean(CLEAN_WITHIN_S)


def _kill_a_rank(cluster: RayCluster, node: str) -> None:
    ranks = [one for one in cluster.hosts[node].processes() if "RankActor" in " ".join(one.cmdline())]
    assert len(ranks) == 2
    psutil.Process(ranks[0].pid).send_signal(signal.SIGKILL)
