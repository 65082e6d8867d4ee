"""Typed messages over one encrypted connection between two nodes, outside of the queue."""

from __future__ import annotations

import fcntl
import select
import socket
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.address import close_at_once, tune
from phalanx.transport.codec import Codec
from phalanx.transport.handshake import Ciphers
from phalanx.transport.link_messages import Note
from phalanx.transport.wire import WireReader, WireWriter

S = TypeVar("S")
R = TypeVar("R")

_UNSENT_BYTES = 16 * 1024
"""What the kernel holds back of ours before it says that it takes no more: what is sent is never old."""


class MessageLink(Generic[S, R]):
    """One end. For one thread. After an error it is of no more use."""

    def __init__(
        self,
        connection: socket.socket,
        ciphers: Ciphers,
        peer: str,
        peer_pid: int,
        *,
        timeout_s: float,
        sent_type: type[S] | Any,
        received_type: type[R] | Any,
    ) -> None:
        """Takes over the connection, which ends when it has not taken what was sent for `timeout_s`.

        `peer` is who to blame.
        """
        self._peer = peer
        self._peer_pid = peer_pid
        self.timeout_s = timeout_s
        self._codec = Codec[S, R](sent_type, received_type)
        self._connection = connection
        connection.setblocking(False)
        tune(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._writer = WireWriter(connection, ciphers.sending)
        self._reader = WireReader(connection, ciphers.receiving, self)
        self._inbox: list[R] = []
        self._room: list[memoryview] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def can_send(self) -> bool:
        """Whether the network takes anything now."""
        return self._is_ready(select.POLLOUT, 0.0)

    def has_arrived(self) -> bool:
        """Whether the other end's host has all that was sent."""
        unacknowledged = fcntl.ioctl(self._connection, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(unacknowledged, sys.byteorder) == 0

    def send(self, message: S, *, deadline_s: float, stop: int | None = None) -> None:
        """Blocks only while the network does not take it, and `stop` (a descriptor) is not readable.

        Raises PeerDiedError, DeadlineError.
        """
        started = time.monotonic()

        def wait() -> None:
            remaining_s = started + deadline_s - time.monotonic()
            if not self._is_ready(select.POLLOUT, remaining_s, stop):
                raise DeadlineError("space in the connection", self._peer, time.monotonic() - started)

        try:
            self._writer.send_frame(self._codec.encode(message, ()), wait)
        except DeadlineError:
            raise
        except OSError as error:
            raise self._died(str(error)) from error

    def receive(self, timeout_s: float = 0.0) -> list[R]:
        """What has come, in its order; waits for something, up to `timeout_s`.

        Raises PeerDiedError at the connection's end, FrameError for bytes that are no messages of the peer's.
        """
        if timeout_s > 0 and not self._is_ready(select.POLLIN, timeout_s):
            return []
        try:
            while not self._inbox and self._read():
                pass
        except OSError as error:
            raise self._died(str(error)) from error
        taken, self._inbox = self._inbox, []
        return taken

    def close(self) -> None:
        """Drops what is not sent yet. May be called more than once."""
        if self._connection.fileno() >= 0:
            close_at_once(self._connection)

    def _read(self) -> bool:
        """Receive once; False if there is nothing now."""
        try:
            num_bytes = self._reader.read()
        except BlockingIOError:
            return False
        if num_bytes == 0:
            raise self._died("the connection is closed")
        return True

    def _is_ready(self, event: int, timeout_s: float, stop: int | None = None) -> bool:
        poller = select.poll()
        poller.register(self._connection, event)
        if stop is not None:
            poller.register(stop, select.POLLIN)
        ready = [fd for fd, _ in poller.poll(max(timeout_s, 0.0) * 1000)]
        return bool(ready) and stop not in ready

    def _died(self, detail: str) -> PeerDiedError:
        return PeerDiedError(self._peer, self._peer_pid, detail)

    # What the reader gives.

    def take_frame(self, parts: list[memoryview], rank: int, num_passed: int) -> None:
        self._inbox.append(self._codec.decode(parts, self._peer)[0])

    def make_room(self, lengths: Sequence[int]) -> list[memoryview]:
        self._room = [memoryview(bytearray(length)) for length in lengths]
        return self._room

    def take_filled(self, rank: int, num_passed: int) -> None:
        self.take_frame(self._room, rank, num_passed)
        self._room = []

    def take_note(self, note: Note) -> None:
        raise FrameError(f"a {type(note).__name__} from {self._peer}")
