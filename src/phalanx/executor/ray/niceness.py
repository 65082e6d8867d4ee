"""The priority of an actor's processes. Ray gives workers a niceness of 15: a busy neighbour all but stops them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from phalanx.executor.ray.fate import raylet_pid

SETTING = "RAY_worker_niceness"
"""Of Ray, where it starts. Who has set it there is heeded."""

_THREADS = Path("/proc/self/task")


def as_nice_as_raylet() -> None:
    """Have all threads of this process, and all that comes from them, run with the priority of their node's raylet.

    It takes the superuser's rights, or a limit (RLIMIT_NICE) that allows it: without, everything stays as it is.
    """
    if SETTING in os.environ:
        return
    niceness, seen = os.getpriority(os.PRIO_PROCESS, raylet_pid()), set[str]()
    with suppress(PermissionError):
        while others := set(os.listdir(_THREADS)) - seen:  # a thread begins as the one that has started it
            seen |= others
            for thread in others:
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def nicer_than_raylet() -> int:
    """By how much the calling thread is, without anybody's having told Ray so."""
    if SETTING in os.environ:
        return 0
    return os.getpriority(os.PRIO_PROCESS, 0) - os.getpriority(os.PRIO_PROCESS, raylet_pid())
