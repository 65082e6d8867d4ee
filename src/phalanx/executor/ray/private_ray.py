"""A Ray for this process alone, on this host, which ends with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from phalanx.executor.ending import kill, living
from phalanx.executor.ray import niceness
from phalanx.executor.ray.discovery import PRIVATE_NODE
from phalanx.transport.liveness import Party

OBJECT_STORE_BYTES = 80 * 2**20
"""The least that Ray takes: nothing of ours goes through it."""

log = logging.getLogger("phalanx.executor")

_PROC = Path("/proc")


class Keeper:
    """The process that ends a private Ray if this one is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: list[Party] = []

    @property
    def is_hired(self) -> bool:
        """Whether there is a private Ray."""
        return self._process is not None

    def hire(self, sockets: Path, pids: Sequence[int]) -> None:
        """Have it keep the processes `pids` and the folder `sockets`."""
        self._kept = living(pids, "a process of Ray's")
        arguments = (os.getpid(), sockets, *pids)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phalanx.executor.ray.keeper", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Ray was shut down: end what it has left, as it does without its head. Does nothing if nobody is hired."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for party in self._kept:
            kill(party)
        self._kept = []


def start_private_ray(num_cpus: int, keeper: Keeper) -> None:
    """Start Ray with all GPUs of this host, connect to it, and have it kept. What fails is left to `ray.shutdown`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    earlier = set(descendants(os.getpid()))
    priority = {} if niceness.SETTING in os.environ else {"worker_niceness": 0}
    context: Any = ray.init(
        "local",
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_name=f"{PRIVATE_NODE}{os.getpid()}",
        _system_config=priority,
    )
    session = Path(context.address_info["session_dir"])
    log.info("Ray was started on this host; its logs are in %s/logs", session)
    keeper.hire(session / "sockets", [pid for pid in descendants(os.getpid()) if pid not in earlier])


def descendants(pid: int, proc: Path = _PROC) -> list[int]:
    """Children of a process, their children, and so on. Any of them, and their threads, may end meanwhile."""
    found: list[int] = []
    for child in _children(proc / str(pid) / "task"):
        found += [child, *descendants(child, proc)]
    return found


def _children(threads: Path) -> list[int]:
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(threads):
            with suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (threads / thread / "children").read_text().split())
    return found
