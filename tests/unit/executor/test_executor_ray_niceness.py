"""Which priority an actor takes, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("ray")

from phalanx.executor.ray.messages import Introduction
from phalanx.executor.ray.niceness import SETTING
from phalanx.executor.ray.rank_actors import _warn_of_niceness
from phalanx.topology.placement import Node

OWN = os.nice(0)
OF_RAYLET, OF_WORKERS = min(OWN + 3, 19), min(OWN + 15, 19)
PROGRAM = """
import os, subprocess, sys, threading
from phalanx.executor.ray.niceness import as_nice_as_raylet, nicer_than_raylet

def refuse(*_):
    raise PermissionError

if sys.argv[1] == "refused":
    os.setpriority = refuse
waits, found = threading.Event(), []
earlier = threading.Thread(target=lambda: (waits.wait(), found.append(os.nice(0))))
earlier.start()
as_nice_as_raylet()
waits.set()
earlier.join()
child = subprocess.check_output([sys.executable, "-c", "import os; print(os.nice(0))"])
print(os.nice(0), found[0], int(child), nicer_than_raylet())
"""


def after(how: str, **environment: str) -> list[int]:
    """The niceness of the calling thread, of one that was there before, and of a child; and what is told of it."""
    raylet = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.nice(OF_RAYLET - OWN))
    try:
        told = {name: value for name, value in os.environ.items() if name != SETTING}
        told |= {"RAY_RAYLET_PID": str(raylet.pid), **environment}
        said = subprocess.check_output(
            ["nice", "-n", str(OF_WORKERS - OWN), sys.executable, "-c", PROGRAM, how], env=told, timeout=60
        )
        return [int(one) for one in said.split()]
    finally:
        raylet.kill()
        raylet.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_everything_runs_as_the_raylet_does() -> None:
    assert after("allowed") == [OF_RAYLET] * 3 + [0]


def test_without_the_right_to_all_stays_as_it_is() -> None:
    assert after("refused") == [OF_WORKERS] * 3 + [OF_WORKERS - OF_RAYLET]


def test_what_was_told_to_ray_is_heeded() -> None:
    assert after("allowed", RAY_worker_niceness="15") == [OF_WORKERS] * 3 + [0]


def test_a_warning_for_each_node(caplog: pytest.LogCaptureFixture) -> None:
    nodes = {name: Node(name, f"host-{name}", "10.0.0.1", 4, 4) for name in "abc"}
    _warn_of_niceness([said("a", 15), said("a", 15), said("b", 0), said("c", 4)], nodes)
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"Ray has the ranks on host-{name} run behind all other processes there" for name in "ac"
    ]
    assert all(message.endswith("start it with RAY_worker_niceness=0") for message in caplog.messages)


def said(node: str, nicer: int) -> Introduction:
    return Introduction(
        node_id=node,
        host=node,
        pid=1,
        raylet_pid=2,
        log="",
        version="",
        devices=(),
        addresses=(),
        nicer_than_raylet=nicer,
    )
