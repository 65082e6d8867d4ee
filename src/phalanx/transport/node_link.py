"""The brain's end of the link to one node."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from phalanx.errors import DeadlineError, FrameError, PeerDiedError, PhalanxError
from phalanx.transport.address import close_at_once, is_unreachable, tune
from phalanx.transport.frame import Part
from phalanx.transport.link_messages import (
    BEATS_PER_TIMEOUT,
    Alive,
    Died,
    Failed,
    Forget,
    Goodbye,
    Note,
    Passed,
)
from phalanx.transport.node_listener import JoinedNode
from phalanx.transport.wire import WireReader, WireWriter

_GOODBYE_S = 0.5


class NodeLink:
    """Frames to all ranks of a node, and their replies. It never blocks to receive.

    As in a ring, a frame can be sent as long as the slowest rank is less than a ring behind; the node says how far its
    ranks are. All but `beat` is for one thread. The first failure is final; it is in `failure`.
    """

    def __init__(self, joined: JoinedNode, node_timeout_s: float) -> None:
        """Takes over the connection."""
        self.node = joined.hello.node
        self.ranks = list(joined.hello.ranks)
        self.failure: PhalanxError | None = None
        self.deaths: dict[int, PeerDiedError] = {}
        self.names = {rank: f"rank {rank} on node {self.node}" for rank in self.ranks}
        self.inbox: deque[tuple[int, list[memoryview]]] = deque()
        self._pid = joined.hello.pid
        self._num_slots = joined.hello.num_slots
        self._timeout_s = node_timeout_s
        self._connection = connection = joined.connection
        tune(connection)
        # The node's end reads at once whatever happens, so what is not acknowledged has not arrived.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(node_timeout_s * 1000))
        self._writer = WireWriter(connection, joined.ciphers.sending)
        self._reader = WireReader(connection, joined.ciphers.receiving, self)
        self._num_sent = self._num_passed = 0
        self._slowest = self.ranks[0]
        self._heard_at = time.monotonic()
        self._num_silent = self._num_heard = 0
        self._room: list[memoryview] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def __str__(self) -> str:
        return f"node {self.node} ({', '.join(f'rank {rank}' for rank in self.ranks)})"

    # ------------------------------------------------------------------ sending

    def has_space(self) -> bool:
        """Whether a frame can be sent: no rank is a whole ring behind."""
        return self._num_sent - self._num_passed < self._num_slots

    def no_space(self, waited_s: float) -> DeadlineError:
        """The error for who has waited for it."""
        return DeadlineError(
            f"space in a ring of {self._num_slots} frames", f"rank {self._slowest} on node {self.node}", waited_s
        )

    def put(self, parts: Sequence[Part], deadline_s: float) -> None:
        """Send to all ranks of the node; there is space. Blocks while the network does not take it.

        Raises DeadlineError naming the node, PeerDiedError if the link is gone; both are final.
        """
        expires_at = time.monotonic() + deadline_s
        try:
            self._writer.send_frame(parts, lambda: self._await_network(expires_at, deadline_s))
        except DeadlineError as error:
            raise self._fail(error) from None
        except PhalanxError:  # of the link, and then it is in `failure`, or of a frame that cannot be sent
            raise
        except OSError as error:
            raise self._fail_sending(error) from error
        self._num_sent += 1

    def forget(self, rank: int) -> None:
        """Go on without this rank; its replies are dropped, those in `inbox` too."""
        self.ranks.remove(rank)
        self.deaths.pop(rank, None)
        self.inbox = deque(reply for reply in self.inbox if reply[0] != rank)
        if self.failure is None:
            self._say(Forget(rank))

    def beat(self) -> None:
        """Tell the node that the brain is there, in a regular interval; from any thread.

        Does not if the network takes nothing now. Also counts the node's silence: what is only measured would include
        time in which this process was stopped, and perhaps the node's too.
        """
        self._num_silent += 1
        if self.failure is None and self._is_ready(select.POLLOUT, 0.0):
            with suppress(OSError):  # who reads from the connection hears of it
                self._writer.try_note(Alive(), self._await_beat)

    def close(self) -> None:
        """Say goodbye and let go; takes half a second at most if the node does not answer."""
        if self.failure is None:
            self._say(Goodbye())
            self._await_end(time.monotonic() + _GOODBYE_S)
        close_at_once(self._connection)

    def _await_end(self, expires_at: float) -> None:
        """The node answers a goodbye by closing its end. What it still says is for nobody."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            while self._is_ready(select.POLLIN, expires_at - time.monotonic()) and self._connection.recv(1 << 16):
                pass

    def _say(self, note: Note) -> None:
        """Whose link is gone needs no telling; that it is shows in the next call."""
        expires_at = time.monotonic() + _GOODBYE_S
        try:
            self._writer.send_note(note, lambda: self._await_network(expires_at, _GOODBYE_S))
        except DeadlineError as error:
            self._fail(error)
        except PhalanxError:
            assert self.failure is not None
        except OSError as error:
            self._fail_sending(error)

    def _await_beat(self) -> None:
        self._is_ready(select.POLLOUT, self._timeout_s)

    def _await_network(self, expires_at: float, deadline_s: float) -> None:
        """Until it takes more of what is to be sent. What comes meanwhile is taken in."""
        remaining_s = expires_at - time.monotonic()
        if not self._is_ready(select.POLLIN | select.POLLOUT, remaining_s):
            raise DeadlineError("space in the connection", str(self), deadline_s)
        self.read()
        if self.failure is not None:
            raise self.failure

    def _is_ready(self, event: int, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._connection, event)
        return bool(poller.poll(max(timeout_s, 0.0) * 1000))

    # ------------------------------------------------------------------ receiving

    def read(self) -> bool:
        """Take in what has come, once; what is whole then is in `inbox`, `deaths` and `failure`. Does not block.

        False if there was nothing, or never will be.
        """
        if self.failure is not None:
            return False
        try:
            num_bytes = self._reader.read()
        except BlockingIOError:
            return False
        except FrameError as error:
            self._fail(FrameError(f"from {self}: {error}"))
        except OSError as error:
            self._fail(self._gone(error))
        else:
            if self._reader.num_messages > self._num_heard:
                self._num_heard = self._reader.num_messages
                self._heard_at = time.monotonic()
                self._num_silent = 0
            if num_bytes == 0:
                self._fail(self._gone(None))
        return self.failure is None

    def judge_silence(self) -> None:
        """Sets `failure` if nothing came for too long. To be called when `read` has just found nothing."""
        if self._num_silent > BEATS_PER_TIMEOUT:
            self._fail(DeadlineError("a sign of life", str(self), time.monotonic() - self._heard_at))

    def _fail(self, error: PhalanxError) -> PhalanxError:
        if self.failure is None:
            self.failure = error
        return self.failure

    def _fail_sending(self, error: OSError) -> PhalanxError:
        """The node may have said why it leaves, before it left."""
        while not is_unreachable(error) and self.read():
            pass
        return self._fail(self._gone(error))

    def _gone(self, error: OSError | None) -> PhalanxError:
        """What a connection's end means: nobody answers, or the node's relay is no more."""
        # A node that was silent for a while and then ends the connection does so because it heard nothing either.
        if self._num_silent > BEATS_PER_TIMEOUT // 2 or (error is not None and is_unreachable(error)):
            return DeadlineError("a sign of life", str(self), time.monotonic() - self._heard_at)
        detail = "the connection to its relay is closed" if error is None else f"the connection to its relay: {error}"
        return PeerDiedError(str(self), self._pid, detail)

    # What the reader gives.

    def take_frame(self, parts: list[memoryview], rank: int, num_passed: int) -> None:
        self._num_passed = num_passed
        if rank in self.ranks:
            self.inbox.append((rank, parts))

    def make_room(self, lengths: Sequence[int]) -> list[memoryview]:
        self._room = [memoryview(bytearray(length)) for length in lengths]
        return self._room

    def take_filled(self, rank: int, num_passed: int) -> None:
        self.take_frame(self._room, rank, num_passed)
        self._room = []

    def take_note(self, note: Note) -> None:
        if isinstance(note, Passed):
            self._num_passed, self._slowest = note.num_frames, note.slowest
        elif isinstance(note, Died):
            if note.rank in self.ranks:
                self.deaths[note.rank] = PeerDiedError(f"rank {note.rank}", note.pid, note.detail)
        elif isinstance(note, Failed):
            self._fail(PeerDiedError(str(self), self._pid, f"its relay failed: {note.reason}"))
        else:
            raise FrameError(f"a {type(note).__name__} from a node")
