"""One thread of a process that sleeps until a descriptor has something to say."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class Poller:
    """Calls back when a descriptor becomes readable or hangs up. One daemon thread; no CPU while nothing happens.

    Edge-triggered: one call for each arrival, and one at registration if something is there already. Callbacks run in
    the poller's thread and under its lock, so that after `remove` returned none runs any more; they must be short, must
    not raise, and may call `remove`.
    """

    _of_process: Poller | None = None
    _creation = threading.Lock()

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._lock = threading.RLock()
        threading.Thread(target=self._run, name="phalanx-poller", daemon=True).start()

    @classmethod
    def of_process(cls) -> Poller:
        """The poller of this process, started by the first call (and again in a forked child, which has no threads)."""
        with cls._creation:
            if cls._of_process is None or cls._of_process._pid != os.getpid():
                cls._of_process = cls()
            return cls._of_process

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` on every arrival at `fd`, until `remove`. The descriptor stays the caller's."""
        with self._lock:
            assert fd not in self._callbacks, fd
            self._callbacks[fd] = callback
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def remove(self, fd: int) -> None:
        """Forget `fd`, which is still open. Blocks while a callback runs (except inside that callback)."""
        with self._lock:
            if self._callbacks.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                with self._lock:
                    callback = self._callbacks.get(fd)
                    if callback is not None:
                        callback()
                    del callback  # what it holds, shared memory perhaps, must not live until the next event
