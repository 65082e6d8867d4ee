"""Where nodes dial in: the brain's listening socket, and the thread that finds out who is there.

It goes on listening during the run, so that whoever tries is counted and logged. It can be made to do little: it takes
at most one connection every few milliseconds, holds a handful at a time, each for a few seconds and a few KiB, and has
no curve operation to do before the other end has shown the key.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress

import msgspec

from phalanx.transport.address import address_of
from phalanx.transport.handshake import Ciphers, Conversation, Refusal, RefusedError, brain_conversation
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello, Welcome
from phalanx.transport.socket_bell import SocketBell

MAX_PENDING = 16
"""Handshakes at a time. One more, and the oldest is dropped: a node takes milliseconds, so it is not a node."""
HANDSHAKE_TIMEOUT_S = 5.0
_PAUSE_S = 0.005
_log = logging.getLogger(__name__)


class JoinedNode(msgspec.Struct, frozen=True):
    """A node that has proved to be one of the run's. Whoever gets it owns the connection, which does not block."""

    connection: socket.socket
    ciphers: Ciphers
    hello: Hello


class NodeListener:
    """Listens from its construction on. `joined` gives the nodes that have come; `refusals` counts the others."""

    def __init__(
        self, listener: socket.socket, key: RunKey, why_not: Callable[[Hello], str | None], welcome: Welcome
    ) -> None:
        """Takes over `listener` (`address.listen_on`).

        `why_not` says, in the listener's thread, why a node with the key is not wanted.
        """
        self._key = key
        self._why_not = why_not
        self._welcome = welcome
        self._seen: set[bytes] = set()
        self._pending: dict[int, _Pending] = {}
        self._joined: list[JoinedNode] = []
        self._changed = threading.Condition()
        self.refusals: Counter[Refusal] = Counter()
        with ExitStack() as undo:
            self._listener = undo.enter_context(listener)
            self._listener.setblocking(False)
            self.address, self.port = address_of(self._listener)
            self._bell = SocketBell()
            self._bell.add(self._listener.fileno())
            self._is_closed = False
            self._thread = threading.Thread(target=self._run, name="phalanx-listener", daemon=True)
            self._thread.start()
            undo.pop_all()

    def joined(self, timeout_s: float) -> list[JoinedNode]:
        """Nodes that have come since the last call; waits for one up to `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._joined, timeout_s)
            taken, self._joined = self._joined, []
            return taken

    def close(self) -> None:
        """Stop listening, close what nobody took, and log how many were refused. May be called more than once."""
        if self._is_closed:
            return
        self._is_closed = True
        self._bell.ring()
        self._thread.join()
        for pending in self._pending.values():
            pending.connection.close()
        for node in self._joined:
            node.connection.close()
        self._listener.close()
        self._bell.close()
        self._log_totals()

    def _run(self) -> None:
        while not self._is_closed:
            self._bell.wait(0, self._until_next_deadline())
            for fd in self._bell.ready():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._pending:  # it was not the oldest of too many just now
                    self._advance(self._pending[fd])
            now = time.monotonic()
            for pending in [p for p in self._pending.values() if p.expires_at <= now]:
                self._refuse(pending, RefusedError(Refusal.SILENT))

    def _until_next_deadline(self) -> float | None:
        first = min((pending.expires_at for pending in self._pending.values()), default=None)
        return None if first is None else max(first - time.monotonic(), 0.0)

    def _accept(self) -> None:
        try:
            connection, peer = self._listener.accept()
        except OSError:  # it left before we came, or there are no descriptors left: the pause below is for that too
            time.sleep(_PAUSE_S)
            return
        connection.setblocking(False)
        if len(self._pending) >= MAX_PENDING:
            oldest = min(self._pending.values(), key=lambda pending: pending.expires_at)
            self._refuse(oldest, RefusedError(Refusal.CROWDED))
        conversation = brain_conversation(self._key, self._seen, self._why_not, self._welcome)
        pending = _Pending(connection, str(peer[0]), conversation)
        self._pending[connection.fileno()] = pending
        self._bell.add(connection.fileno())
        self._advance(pending)
        time.sleep(_PAUSE_S)

    def _advance(self, pending: _Pending) -> None:
        try:
            pending.advance()
        except StopIteration as stop:
            self._drop(pending)
            with self._changed:
                self._joined.append(JoinedNode(pending.connection, stop.value, stop.value.peer))
                self._changed.notify_all()
        except RefusedError as error:
            self._refuse(pending, error)
        except OSError:
            self._refuse(pending, RefusedError(Refusal.LEFT))

    def _refuse(self, pending: _Pending, error: RefusedError) -> None:
        self._drop(pending)
        with pending.connection, suppress(OSError):
            pending.connection.send(error.answer)
        self.refusals[error.refusal] += 1
        if self.refusals[error.refusal] == 1:
            detail = f" ({error})" if str(error) else ""
            _log.warning(
                "refused a connection from %s: %s%s; more of this kind are counted and told at the end",
                pending.peer,
                error.refusal.value,
                detail,
            )

    def _log_totals(self) -> None:
        if self.refusals.total() > len(self.refusals):  # the first of each kind was logged when it came
            totals = "; ".join(f"{refusal.value} ({count})" for refusal, count in self.refusals.most_common())
            _log.warning("refused %d connections in all: %s", self.refusals.total(), totals)

    def _drop(self, pending: _Pending) -> None:
        fd = pending.connection.fileno()
        self._bell.remove(fd)
        del self._pending[fd]


class _Pending:
    """A connection whose other end is not known yet."""

    def __init__(self, connection: socket.socket, peer: str, conversation: Conversation) -> None:
        self.connection = connection
        self.peer = peer
        self.expires_at = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._conversation = conversation
        self._received = bytearray()
        self._wanted = self._go_on(None)

    def advance(self) -> None:
        """Take in what is there. Raises StopIteration with the Ciphers, RefusedError, or OSError."""
        while True:
            try:
                data = self.connection.recv(self._wanted - len(self._received))
            except BlockingIOError:
                return
            if not data:
                raise ConnectionResetError
            self._received += data
            if len(self._received) == self._wanted:
                received = bytes(self._received)
                self._received.clear()
                self._wanted = self._go_on(received)

    def _go_on(self, received: bytes | None) -> int:
        """The number of bytes that the conversation wants next, after sending what it has to say."""
        step = self._conversation.send(received) if received is not None else next(self._conversation)
        while isinstance(step, bytes):
            # Some hundred bytes into an empty socket buffer: it takes them all at once.
            if self.connection.send(step) != len(step):
                raise ConnectionResetError
            step = next(self._conversation)
        return step
