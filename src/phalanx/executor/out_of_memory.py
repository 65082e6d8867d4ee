"""Whether the kernel has killed for lack of memory: what its counters say, and no guess beyond."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_Read = Callable[[str], str | None]

NOT_FOR_MEMORY = ", not by the kernel for lack of memory"

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


class OutOfMemoryKills(NamedTuple):
    """How many processes the kernel has killed for lack of memory so far; None where it does not say."""

    in_cgroup: int | None
    """Of this process's control group and those below, for reaching the group's limit or the host's."""
    on_host: int | None

    @classmethod
    def now(cls, read: _Read | None = None) -> OutOfMemoryKills:
        """`read` gives a file's text, None if it cannot be read."""
        read = read or _read
        return cls(_in_cgroup(read), _count(read("/proc/vmstat")))

    def explain(self, now: OutOfMemoryKills) -> str:
        """What to say of a process that was killed by SIGKILL between these counts and those of `now`."""
        if self.in_cgroup is not None and now.in_cgroup is not None and now.in_cgroup > self.in_cgroup:
            return "; since it began, the kernel has killed in its control group for lack of memory"
        if self.on_host is None or now.on_host is None:
            return " (out of memory?)"
        if now.on_host > self.on_host:
            return "; since it began, the kernel has killed on this host for lack of memory"
        return NOT_FOR_MEMORY


def _in_cgroup(read: _Read) -> int | None:
    for line in (read("/proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and (count := _count(read(f"/sys/fs/cgroup{path.rstrip('/')}/memory.events"))) is not None:
            return count
        if "memory" in controllers.split(","):
            return _count(read(f"/sys/fs/cgroup/memory{path.rstrip('/')}/memory.oom_control"))
    return None


def _count(text: str | None) -> int | None:
    found = _COUNT.search(text or "")
    return int(found[1]) if found else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
