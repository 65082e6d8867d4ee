"""The node's end of a link: from one TCP stream into a ring that all ranks of the node read, and back.

Messages are not decoded; a large frame is decrypted right into the memory that the ranks read. The brain never sends
more frames than the ring has space for, so that the relay never waits for a rank; and while it waits for the network to
take what the ranks say, it goes on receiving. So it hears at any time whether the brain is still there.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError, PhalanxError
from phalanx.transport.address import close_at_once, is_unreachable, tune
from phalanx.transport.dialling import dial
from phalanx.transport.futex import long_spin_s_for, new_fence
from phalanx.transport.handshake import VERSION, Ciphers
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import (
    BEATS_PER_TIMEOUT,
    Alive,
    Died,
    Failed,
    Forget,
    Goodbye,
    Hello,
    Note,
    Passed,
    Welcome,
)
from phalanx.transport.liveness import Party
from phalanx.transport.queue import DEFAULT_SHAPE, MessageQueue, QueueHandle, QueueShape
from phalanx.transport.waiter import SpinTime
from phalanx.transport.wire import WireReader, WireWriter

_GATHER_S = 50e-6
"""For replies that are about to come. To send and to receive one more message takes about as long."""


class NodeRelay:
    """Owns the node's ring. `dial`, then `run`; `close` from any thread."""

    def __init__(self, node: str, ranks: Sequence[int], *, shape: QueueShape = DEFAULT_SHAPE) -> None:
        """The ring of `ranks` (global numbers, at least one) is there from now on: see `handle`."""
        assert ranks
        self.node = node
        self.ranks = tuple(ranks)
        self._readers = {rank: reader for reader, rank in enumerate(self.ranks)}
        self._hello = Hello(VERSION, node, self.ranks, os.getpid(), shape.num_slots)
        self._queue: MessageQueue[msgspec.Raw, msgspec.Raw] = MessageQueue(
            [f"rank {rank}" for rank in ranks],
            command_type=msgspec.Raw,
            reply_type=msgspec.Raw,
            shape=shape,
            name=f"the relay of node {node}",
            long_spin_s=long_spin_s_for(len(ranks) + 1),
        )
        self._link: _Link | None = None
        self._running = threading.RLock()
        self._is_closed = False

    def handle(self, rank: int) -> QueueHandle:
        """What this rank attaches with. `handle.brain` is this process, at whose end the rank's queue ends."""
        return self._queue.handle(self._readers[rank])

    def expect(self, rank: int, party: Party) -> None:
        """Watch the process that will attach as this rank: its death before that is noticed too. Before `run`."""
        self._queue.expect(self._readers[rank], party)

    def dial(
        self, address: str, port: int, key: RunKey, *, deadline_s: float, source_address: str | None = None
    ) -> None:
        """Connect to the brain and come to trust each other. `source_address`: of this host, to dial from.

        Raises as `dialling.dial`.
        """
        connection, ciphers = dial(
            address,
            port,
            key,
            self._hello,
            party=f"the relay of node {self.node}",
            deadline_s=deadline_s,
            source_address=source_address,
        )
        self._link = _Link(connection, ciphers, self._queue, self._hello)

    def run(self) -> None:
        """Carry frames until the link ends; then the node's queue is closed, and its ranks with it.

        Returns when the brain closed its queue or `close` was called. Raises PeerDiedError if the brain is gone,
        DeadlineError after its silence, FrameError for bytes that are not the brain's.
        """
        link = self._link
        assert link is not None
        with self._running:
            try:
                if not self._is_closed:
                    link.run()
            except PhalanxError:
                if not self._is_closed:
                    raise
            finally:
                self._release()

    def close(self) -> None:
        """End the link and the node's queue. May be called more than once; from another thread it ends `run`."""
        self._is_closed = True
        if self._link is not None:
            self._link.end()
        with self._running:
            self._release()

    def _release(self) -> None:
        if self._link is not None:
            self._link.close()
        self._queue.close()


class _Link:
    """Carries frames both ways. One sleeper waits for the network and one for the ranks, each in a thread.

    The one that is woken takes its turn: it carries whatever there is, either way, until there has been nothing for a
    moment. The other one, if it is woken meanwhile, waits for the turn and mostly finds nothing left to do.
    """

    def __init__(
        self,
        connection: socket.socket,
        ciphers: Ciphers,
        queue: MessageQueue[msgspec.Raw, msgspec.Raw],
        hello: Hello,
    ) -> None:
        assert isinstance(ciphers.peer, Welcome)
        self._connection = connection
        self._queue = queue
        self._node = hello.node
        self._ranks = hello.ranks
        self._num_slots = hello.num_slots
        self._brain = ciphers.peer
        self._fence = new_fence()
        self._turn = threading.Lock()
        self._spin = SpinTime(0.0, long_spin_s_for(len(hello.ranks) + 1))
        self._rung = 0
        self._active_at = 0.0
        self._arrivals = select.epoll()
        self._arrivals.register(connection, select.EPOLLIN)
        self._writer = WireWriter(connection, ciphers.sending)
        self._reader = WireReader(connection, ciphers.receiving, self)
        self._num_received = self._num_told = 0
        self._num_replies = self._num_expected = 0  # since the last command; to the one before
        self._blamed: int | None = None
        self._told_dead: set[int] = set()
        self._beat_s = self._brain.node_timeout_s / BEATS_PER_TIMEOUT
        self._beat_at = 0.0
        self._silent_s = 0.0
        self._looked_at = time.monotonic()
        self._is_over = False
        self._failure: Exception | None = None
        tune(connection)
        connection.setblocking(False)

    def run(self) -> None:
        """Returns after a goodbye or `end`; raises what ended it otherwise."""
        other = threading.Thread(target=self._wait_for_ranks, name="phalanx-relay", daemon=True)
        other.start()
        self._wait_for_network()
        self.end()
        other.join()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """End both threads' work; from any thread."""
        self._is_over = True
        with suppress(OSError):  # it is closed already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._queue.bell.ring()

    def close(self) -> None:
        """After `run`, or instead of it. May be called more than once."""
        if self._connection.fileno() >= 0:
            self._arrivals.close()
            close_at_once(self._connection)

    def _wait_for_network(self) -> None:
        while not self._is_over:
            self._arrivals.poll(self._beat_s)
            self._take_turn()

    def _wait_for_ranks(self) -> None:
        while not self._is_over:
            self._queue.bell.wait(self._rung, max(self._beat_at - time.monotonic(), 0.0))
            self._take_turn()

    def _take_turn(self) -> None:
        try:
            with self._turn:
                self._carry()
        except Exception as error:
            if not self._is_over:
                is_ours = isinstance(error, PhalanxError)  # a DeadlineError is an OSError too
                self._failure = self._gone(error) if isinstance(error, OSError) and not is_ours else error
                self._tell(self._failure)
            self.end()

    def _carry(self) -> None:
        """Whatever there is, until there has been nothing for a moment."""
        spin_until, looked_at = 0.0, -1
        while not self._is_over:
            rung = self._queue.bell.value()
            self._fence()
            has_read = self._read()
            has_sent = rung != looked_at and self._send_replies()
            looked_at = rung
            now = time.monotonic()
            if has_read or has_sent:
                self._spin.adapt(now - self._active_at)
                self._active_at, spin_until = now, now + self._spin.now_s
                if self._is_pressing() or now >= self._beat_at:
                    self._send_news(now)
            elif now < spin_until:
                os.sched_yield()
            else:
                self._note_silence(now)
                self._send_news(now)
                self._rung = rung
                return

    def _read(self) -> bool:
        """Receive once, if something is there."""
        if not self._arrivals.poll(0):
            return False
        num_messages = self._reader.num_messages
        if self._reader.read() == 0 and not self._is_over:
            raise PeerDiedError(self._brain.brain, self._brain.pid, "the connection to it is closed")
        if self._reader.num_messages > num_messages:
            self._silent_s, self._looked_at = 0.0, time.monotonic()
        return True

    def _await_network(self) -> None:
        """Until it takes more of what is to be sent. What comes meanwhile is received.

        Raises ConnectionAbortedError once the link is over: nobody reads the rest.
        """
        poller = select.poll()
        poller.register(self._connection, select.POLLIN | select.POLLOUT)
        poller.poll(self._beat_s * 1000)
        if not self._read():
            self._note_silence(time.monotonic())
        if self._is_over:
            raise ConnectionAbortedError

    def _note_silence(self, now: float) -> None:
        # Time in which this process was stopped must not pass for the brain's silence: it may have been stopped too.
        passed_s = min(now - self._looked_at, self._beat_s)
        self._silent_s, self._looked_at = self._silent_s + passed_s, now
        if self._silent_s >= self._brain.node_timeout_s:
            raise DeadlineError("a sign of life", self._brain.brain, self._silent_s)

    def _gone(self, error: OSError) -> PhalanxError:
        if is_unreachable(error):
            return DeadlineError("a sign of life", self._brain.brain, self._brain.node_timeout_s)
        return PeerDiedError(self._brain.brain, self._brain.pid, f"the connection to it: {error}")

    def take_frame(self, parts: list[memoryview], rank: int, num_passed: int) -> None:
        self._queue.put_frame_now(parts)
        self._note_command()

    def make_room(self, lengths: Sequence[int]) -> list[memoryview]:
        return self._queue.reserve(lengths)

    def take_filled(self, rank: int, num_passed: int) -> None:
        self._queue.publish()
        self._note_command()

    def take_note(self, note: Note) -> None:
        if isinstance(note, Forget):
            self._queue.forget(self._ranks.index(note.rank))
        elif isinstance(note, Goodbye):
            self._is_over = True
        elif not isinstance(note, Alive):
            raise FrameError(f"a {type(note).__name__} from the brain")

    def _note_command(self) -> None:
        self._num_received += 1
        self._num_expected, self._num_replies = self._num_replies, 0

    def _tell(self, error: Exception) -> None:
        """Say why to the brain, if that needs no waiting."""
        with suppress(OSError):
            self._writer.try_note(Failed(f"{type(error).__name__}: {error}"), _wait_not)

    def _send_replies(self) -> bool:
        """All that are there, together; False if there are none."""
        if not self._collect():
            return False
        self._await_replies()
        self._writer.flush(self._await_network)
        return True

    def _collect(self) -> bool:
        """Hand what is there to the writer, which sends it at the next flush; False if there is nothing."""
        has_found = False
        for reader, parts in self._queue.frames():
            if not has_found:  # only what is sent is told
                self._num_told, _ = self._queue.passed(tell=False)
                has_found = True
            rank, num_passed = self._ranks[reader], self._num_told
            self._writer.send_frame(parts, self._await_network, rank=rank, num_passed=num_passed, more=True)
            self._num_replies += 1
        return has_found

    def _await_replies(self) -> None:
        """As many as there were to the command before, if they come at once. To send one more message takes longer."""
        expires_at = time.monotonic() + _GATHER_S
        while self._num_replies < self._num_expected and time.monotonic() < expires_at:
            os.sched_yield()  # to ranks that share this core
            self._collect()

    def _send_news(self, now: float) -> None:
        self._send_deaths()
        self._send_passed(now)

    def _send_deaths(self) -> None:
        deaths = [(reader, death) for reader, death in self._queue.deaths() if reader not in self._told_dead]
        if deaths:
            self._send_replies()  # what they still said is all there now
        for reader, death in deaths:
            self._told_dead.add(reader)
            detail = f"on node {self._node}" + (f": {death.detail}" if death.detail else "")
            self._writer.send_note(Died(self._ranks[reader], death.pid, detail), self._await_network)

    def _send_passed(self, now: float) -> None:
        """If it is time for a sign of life, or if the brain may wait for space that is there now."""
        is_pressing = self._is_pressing()
        if not is_pressing and now < self._beat_at:
            return
        num_passed, slowest = self._queue.passed(tell=is_pressing)
        is_full = self._num_received - num_passed >= self._num_slots
        blamed = slowest if is_full else None
        is_news = num_passed > self._num_told or (is_full and blamed != self._blamed)
        self._blamed = blamed
        if is_news or now >= self._beat_at:
            note = Passed(num_passed, self._ranks[slowest])
            self._writer.send_note(note, self._await_network)
            self._num_told = num_passed
            self._beat_at = now + self._beat_s

    def _is_pressing(self) -> bool:
        """Whether half of the ring is, as far as the brain knows, not free again."""
        return self._num_received - self._num_told >= max(self._num_slots // 2, 1)


def _wait_not() -> None:
    raise BlockingIOError
