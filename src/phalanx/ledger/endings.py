"""A watcher's wait from one look to the next, which ends at once with a rank."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress

from phalanx.ledger.confirmation import LOOK_S


class Endings:
    """Waits between looks, and not to the end when a rank ends. A context manager."""

    def __init__(self) -> None:
        self.has_one: bool = False
        """Whether the last wait was for less long because a rank had ended."""
        self._pidfds: dict[int, int] = {}
        self._poll = select.poll()

    def __enter__(self) -> Endings:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self._pidfds.values():
            if pidfd >= 0:
                os.close(pidfd)

    def wait(
        self,
        stop: int,
        pids: list[int],
        at_most_s: float = LOOK_S,
        all_go_on: Callable[[int], bool] | None = None,
    ) -> bool:
        """Whether it is time to stop; else returns after so long, or as soon as one of the processes has ended. Waits
        again as long as `all_go_on`."""
        for pid in pids:
            if pid not in self._pidfds:
                self._add(pid)
        self._poll.register(stop, select.POLLIN)
        at_most_ms = at_most_s * 1000
        while not (found := self._poll.poll(at_most_ms)) and all_go_on is not None and all_go_on(time.monotonic_ns()):
            pass
        ready = [descriptor for descriptor, _ in found]
        self.has_one = bool(set(ready) - {stop})
        for pid, pidfd in self._pidfds.items():
            if pidfd in ready:
                self._poll.unregister(pidfd)
                os.close(pidfd)
                self._pidfds[pid] = -1
        return stop in ready

    def _add(self, pid: int) -> None:
        self._pidfds[pid] = -1
        with suppress(OSError):  # it has ended; or the kernel has no such thing, and a look will tell
            self._pidfds[pid] = pidfd = os.pidfd_open(pid)
            self._poll.register(pidfd, select.POLLIN)
