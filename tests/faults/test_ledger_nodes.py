"""Ranks on several nodes: the ledger names rank, node and operation, or the node that cannot be heard."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Direction
from ray_cluster import RayCluster

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("sabotaged_cluster.py")
SETTINGS = {
    "tensor_parallel_size": 2,
    "allow_split_tensor_parallel": True,
    "ray_per_worker_gpus": 2.0,
    "step_timeout_s": 20.0,
}
"""Rank 0 is beside the brain, rank 1 on another node."""
TOLD_WITHIN_S = 2.5
SILENCE_TOLD_WITHIN_S = 5.0
HEARD_AGAIN_WITHIN_S = 5.0
GONE_WITHIN_S = 5.0
NEW_WATCHER_WITHIN_S = 20.0


class SabotagedRun:
    """The script, on the cluster's head."""

    def __init__(self, cluster: RayCluster, checkpoint: Path, settings: dict[str, Any]) -> None:
        command = [sys.executable, str(SCRIPT), str(checkpoint), cluster.address, json.dumps(settings)]
        self._cluster = cluster
        self._process = cluster.head.popen(
            *command, env=cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.nodes: list[str] = self._answer()["nodes"]

    def rank(self, rank: int) -> psutil.Process:
        """Its process."""
        (found,) = self._cluster.ranks(self._cluster.hosts[self.nodes[rank]])
        return found

    def watcher_beside(self, rank: int) -> psutil.Process:
        """That of its node."""
        host = self._cluster.hosts[self.nodes[rank]]
        (found,) = (p for p in host.processes() if "phalanx.executor.watcher_process" in p.cmdline())
        return found

    def tell(self, command: str, *arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the script has ended"
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@contextmanager
def running(cluster: RayCluster, checkpoint: Path, **settings: object) -> Iterator[SabotagedRun]:
    """Nothing is left of it on any host."""
    run = SabotagedRun(cluster, checkpoint, {**SETTINGS, **settings})
    try:
        yield run
    finally:
        run.close()
    cluster.expect_clean(GONE_WITHIN_S)


def test_a_run_with_troubles(ray_cluster: RayCluster, checkpoint: Path) -> None:
    with running(ray_cluster, checkpoint) as run:
        trouble(ray_cluster, run)


def trouble(ray_cluster: RayCluster, run: SabotagedRun) -> None:
    cable = ray_cluster.cables[run.nodes[1]]
    assert run.nodes[0] == ray_cluster.head.name != run.nodes[1]

    with cable.impaired(sent=Direction(0.2, 0.05), received=Direction(0.0, 0.05)):
        run.tell("begin", 3)
        assert run.tell("end") == {}
        assert run.tell("verdict", 1.0) == {}, "a slow network is no finding"

    run.tell("begin", 60)
    assert run.tell("end") == {}
    for trouble in (cable.cut(), cable.impaired(received=Direction(loss=1.0))):
        with trouble:
            silent = run.tell("verdict", SILENCE_TOLD_WITHIN_S)
        assert (silent["cause"], silent["nodes"]) == ("lost", [run.nodes[1]]), silent
        assert silent["text"].startswith(f"node {run.nodes[1]} (rank 1) is gone or cannot be reached: nothing"), silent
        assert run.tell("all_is_well", HEARD_AGAIN_WITHIN_S) == {}

    run.tell("sabotage", 1, "stop", 11)
    run.tell("begin", 60)
    stopped = run.tell("verdict", TOLD_WITHIN_S)
    run.rank(1).send_signal(signal.SIGCONT)
    assert (stopped["cause"], stopped["culprits"], stopped["nodes"]) == ("stopped", [1], [run.nodes[1]]), stopped
    assert run.tell("end") == {}

    run.tell("sabotage", 1, "kill", 11)
    run.tell("begin", 60)
    gone = run.tell("verdict", TOLD_WITHIN_S)
    assert (gone["cause"], gone["culprits"], gone["nodes"]) == ("gone", [1], [run.nodes[1]]), gone
    assert run.tell("end")["error"] == "PeerDiedError"


def test_a_node_whose_watcher_is_silent_is_not_lost_as_long_as_steps_go_on(
    ray_cluster: RayCluster, checkpoint: Path
) -> None:
    with running(ray_cluster, checkpoint) as run:
        run.tell("begin", 60)
        assert run.tell("end") == {}
        here, there = run.tell("status")["ranks"]
        assert (here[:3], there[:3]) == ([run.nodes[0], "running", True], [run.nodes[1], "running", False])
        assert here[3] == there[3] > 0, "the step that it was in last is known of a rank elsewhere as well"
        watcher = run.watcher_beside(1)
        watcher.suspend()
        lost = run.tell("verdict", SILENCE_TOLD_WITHIN_S)
        assert (lost["cause"], lost["nodes"]) == ("lost", [run.nodes[1]]), lost
        run.tell("begin", 60)
        assert run.tell("all_is_well", HEARD_AGAIN_WITHIN_S) == {}
        assert run.tell("end") == {}
        assert [one[1] for one in run.tell("status")["ranks"]] == ["running", "not watched"]
        watcher.kill()
        ends_at = time.monotonic() + NEW_WATCHER_WITHIN_S
        while [one[1] for one in run.tell("status")["ranks"]] != ["running", "running"]:
            assert time.monotonic() < ends_at, "the agent has not replaced it"
            time.sleep(0.1)


def test_a_rank_that_leaves_a_step_where_none_is_beside_the_brain(ray_cluster: RayCluster, checkpoint: Path) -> None:
    """Its verdict ends the run: ranks are killed on all nodes."""
    with running(ray_cluster, checkpoint, data_parallel_size_local=0) as run:
        assert len({ray_cluster.head.name, *run.nodes}) == 3
        run.tell("begin", 60)
        assert run.tell("end") == {}
        run.tell("sabotage", 1, "skip the rest", 11)
        run.tell("begin", 60)
        skipped = run.tell("verdict", TOLD_WITHIN_S)
        assert (skipped["cause"], skipped["culprits"], skipped["nodes"]) == ("skipped", [1], [run.nodes[1]]), skipped
        assert "without all_reduce float32 [1, 1, 72]" in skipped["text"], skipped
        assert "\n  rank 1 is at\n" in skipped["text"] and "\n  rank 0 is at\n" in skipped["text"], skipped
        ended_at = time.monotonic()
        ended = run.tell("end")
        assert time.monotonic() - ended_at < TOLD_WITHIN_S
        assert ended["error"] == "HungError" and ended["message"].startswith(f"rank 1 on {run.nodes[1]} has left step")
