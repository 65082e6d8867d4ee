"""No process outlives the one that it works for (invariant 6), not even after SIGKILL."""

from __future__ import annotations

import ctypes
import os
import signal

from phalanx.executor.out_of_memory import NOT_FOR_MEMORY, OutOfMemoryKills

PR_SET_PDEATHSIG = 1

WITH_FORK_SERVER = "its fork server ended"
WITH_ACTOR = "its actor ended"
WITH_AGENT = "its node's agent ended"
WITH_RAYLET = "its node's raylet ended"
_WITH_OTHERS = (WITH_FORK_SERVER, WITH_ACTOR, WITH_AGENT, WITH_RAYLET)
"""So begins what is said of a rank that ends with a process that takes no steps, but has started it or serves it."""

_SENT_BY_OTHERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Nothing that a process computes ends it by one of these."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process with SIGKILL when the thread that forked it ends.

    `parent_pid` is the parent that is meant: if it is gone already the signal would never come, so the process ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def describe_exit(code: int, kills_before: OutOfMemoryKills | None = None) -> str:
    """How a process ended, in words, from its exit code; a negative one is the number of the signal that killed it.

    `kills_before`: as counted when it began.
    """
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    if -code != signal.SIGKILL:
        return f"killed by {name}"
    return f"killed by {name}" + (kills_before or OutOfMemoryKills(None, None)).explain(OutOfMemoryKills.now())


def was_ended_from_outside(how: str) -> bool:
    """Whether it was not what a process did that ended it so (`describe_exit`), as far as anybody can tell.

    Nobody is told who has sent a signal. SIGKILL is the kernel's own when there is no memory, which its counters show.
    """
    by_name = how.startswith(tuple(f"killed by {number.name}" for number in _SENT_BY_OTHERS))
    return by_name or NOT_FOR_MEMORY in how or how.startswith(_WITH_OTHERS)
