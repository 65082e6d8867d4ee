"""Bells for an end that waits for sockets: each is level-triggered, so what is not read is seen again.

Both keep the sockets in one epoll set, of which `ready` gives those that have something to say.
"""

from __future__ import annotations

import os
import select

from phalanx.transport.futex import Doorbell
from phalanx.transport.readiness import Poller

_EVENTS = select.EPOLLIN | select.EPOLLRDHUP


class SocketBell:
    """For an end that waits for nothing in shared memory. It sleeps in epoll, so that a socket wakes it at once."""

    def __init__(self) -> None:
        self._rung = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sleepers = select.epoll()
        self._sockets = select.epoll()
        self._sleepers.register(self._rung, select.EPOLLIN)
        self._sleepers.register(self._sockets.fileno(), select.EPOLLIN)

    def add(self, fd: int) -> None:
        """A socket that wakes who waits."""
        self._sockets.register(fd, _EVENTS)

    def remove(self, fd: int) -> None:
        """No longer; `fd` is still open."""
        self._sockets.unregister(fd)

    def ready(self) -> list[int]:
        """The sockets that have something to say. Does not block."""
        return [fd for fd, _ in self._sockets.poll(0)]

    def value(self) -> int:
        """Nothing to remember: a ring that nobody has waited for yet is found by the next wait."""
        return 0

    def ring(self) -> None:
        """Wake who waits, or the next that would."""
        os.eventfd_write(self._rung, 1)

    def wait(self, seen: int, timeout_s: float | None) -> bool:
        """Block until it is rung or a socket has something to say. As `Bell.wait`."""
        woken = self._sleepers.poll(timeout_s)
        if any(fd == self._rung for fd, _ in woken):
            os.eventfd_read(self._rung)
        return bool(woken)

    def close(self) -> None:
        self._sleepers.close()
        self._sockets.close()
        os.close(self._rung)


class BridgedBell:
    """For an end that also waits for rings in shared memory, and so sleeps on their doorbell.

    The process's Poller thread rings it when a socket has something to say; but only while somebody sleeps, as else
    each arrival would wake that thread, which wants the interpreter's lock just when the end that reads needs it.
    """

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._sockets = select.epoll()
        self._armed = select.epoll()
        self._fds: list[int] = []
        self._poller = Poller.of_process()
        self._poller.add(self._armed.fileno(), self._wake)

    def add(self, fd: int) -> None:
        """A socket that wakes who waits."""
        self._sockets.register(fd, _EVENTS)
        self._armed.register(fd, 0)
        self._fds.append(fd)

    def remove(self, fd: int) -> None:
        """No longer; `fd` is still open."""
        self._fds.remove(fd)
        self._armed.unregister(fd)
        self._sockets.unregister(fd)

    def ready(self) -> list[int]:
        """The sockets that have something to say. Does not block."""
        return [fd for fd, _ in self._sockets.poll(0)]

    def value(self) -> int:
        return self._doorbell.value()

    def ring(self) -> None:
        self._doorbell.ring()

    def wait(self, seen: int, timeout_s: float | None) -> bool:
        """Block until it is rung or a socket has something to say. As `Bell.wait`."""
        for fd in self._fds:  # what is there already wakes the Poller at once
            self._armed.modify(fd, _EVENTS | select.EPOLLONESHOT)
        return self._doorbell.wait(seen, timeout_s)

    def _wake(self) -> None:
        self._armed.poll(0)  # disarms what it finds
        self._doorbell.ring()

    def close(self) -> None:
        self._poller.remove(self._armed.fileno())
        self._armed.close()
        self._sockets.close()
