"""A ring of frames in shared memory: one writer, several readers, each of which gets every frame.

Memory, in lines of 64 bytes so that no two processes write to the same cache line:

    geometry         magic, slot_bytes, num_slots, num_readers
    writer           pid, start time, state; whether it waits for space
    reader 0 .. N-1  pid, start time, state; cursor = number of frames it is done with
    slot 0 .. S-1    sequence number, then the frame

Frame number n lives in slot n % S, and is there once that slot's sequence number is n + 1. The writer may overwrite it
once every cursor is above n. The protocol, where F is a full barrier (`futex.new_fence`):

    writer:    wait until min(cursors) > n - S; payload; F; sequence = n + 1; F; ring readers_bell
    reader:    wait until sequence == n + 1; F; payload; F; cursor = n + 1; F; if the writer waits, ring writer_bell
    to wait:   (the writer: say so;) seen = bell's count; F; test; sleep while the count is `seen`; again
    to close:  closed = 1; F; ring. Who sees it: F; take the frames that are there; then stop

tests/unit/transport/test_transport_ring_model.py checks every interleaving under a weak memory model, and that each F
is needed.
All words are 64 bits, aligned, and written by one process each, but for a reader's state: it closes, the writer
forgets.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.frame import Part, align, lay_out, read_frame, write_frame
from phalanx.transport.futex import Doorbell, new_fence
from phalanx.transport.liveness import Party, Watch
from phalanx.transport.shared_memory import SegmentHandle
from phalanx.transport.spill import SpillReader, SpillWriter

_MAGIC = int.from_bytes(b"PHXRING1", "little")
_GEOMETRY = struct.Struct("<4Q")
_LINE_BYTES = 64
_LINE_WORDS = 8
# Words of a party's line.
_PID, _START_TIME, _STATE, _CURSOR = 0, 1, 2, 3
_WRITER_WAITS = 3
_CLOSED, _FORGOTTEN = 1, 2


class RingShape(msgspec.Struct, frozen=True):
    """Sizes of a ring. `slot_bytes` is a multiple of 64, at least 128."""

    slot_bytes: int
    num_slots: int
    num_readers: int

    def __post_init__(self) -> None:
        assert self.slot_bytes >= 2 * _LINE_BYTES
        assert self.slot_bytes == align(self.slot_bytes)
        assert self.num_slots > 0
        assert self.num_readers > 0

    @property
    def size_bytes(self) -> int:
        """Memory that the ring takes, a multiple of 64."""
        return self.slots_at + self.num_slots * self.slot_bytes

    @property
    def slots_at(self) -> int:
        """Where slot 0 starts."""
        return (2 + self.num_readers) * _LINE_BYTES


def format_ring(memory: memoryview, shape: RingShape) -> None:
    """Make a ring of `memory`, which is zero and has `shape.size_bytes` bytes, before any party opens it."""
    _GEOMETRY.pack_into(memory, 0, _MAGIC, *msgspec.structs.astuple(shape))


class _Seats:
    """The lines of a ring's header in which its parties say who they are, and the slots' addresses."""

    def __init__(self, memory: memoryview, shape: RingShape) -> None:
        if _GEOMETRY.unpack_from(memory, 0) != (_MAGIC, *msgspec.structs.astuple(shape)):
            raise FrameError(f"this memory is not a ring of {shape}")
        self.words = memory.cast("Q")
        self.fence = new_fence()
        starts = range(shape.slots_at, shape.size_bytes, shape.slot_bytes)
        self.slots = [memory[start : start + shape.slot_bytes] for start in starts]
        self.sequence_words = [start // 8 for start in starts]
        self.writer = _LINE_WORDS
        self.readers = [(2 + r) * _LINE_WORDS for r in range(shape.num_readers)]

    def take(self, line: int, party: Party) -> None:
        self.words[line + _START_TIME] = party.start_time
        self.fence()
        self.words[line + _PID] = party.pid

    def party(self, line: int, name: str) -> Party | None:
        """Who sits there, None if nobody does yet."""
        pid = self.words[line + _PID]
        if pid == 0:
            return None
        self.fence()
        return Party(name, pid, self.words[line + _START_TIME])


class Peer:
    """What one end of a ring knows of a party at the other end, and the check that it is still there."""

    def __init__(self, name: str, line: int, seats: _Seats, watch: Watch) -> None:
        self.name = name
        self.party: Party | None = None
        self._line = line
        self._seats = seats
        self._watch = watch
        self._is_seated = False

    def expect(self, party: Party) -> None:
        """Watch the process that will attach, before it has."""
        self.party = party
        self._watch.add(party)

    def death(self) -> PeerDiedError | None:
        """The error to raise if it died or closed its end. What it wrote before is visible after this call."""
        if not self._is_seated:
            self._look()
        if self.party is None:
            return None
        if self.party in self._watch.dead:
            return self.party.died()
        if self._seats.words[self._line + _STATE] == _CLOSED:
            self._seats.fence()
            return self.party.died("it closed its end of the queue")
        return None

    def _look(self) -> None:
        party = self._seats.party(self._line, self.name)
        if party is not None:
            self._is_seated = True
            self.expect(party)

    def __str__(self) -> str:
        return f"{self.name} (which never attached)" if self.party is None else str(self.party)


class RingWriter:
    """The end that puts frames. For one thread."""

    def __init__(
        self,
        memory: memoryview,
        shape: RingShape,
        *,
        me: Party,
        readers: Sequence[str],
        watch: Watch,
        readers_bell: Doorbell,
        writer_bell: Doorbell,
    ) -> None:
        """`memory`: what `format_ring` made. `watch` rings `writer_bell`. Raises FrameError if it is something else."""
        self._seats = seats = _Seats(memory, shape)
        self._words, self._fence = seats.words, seats.fence
        self._num_slots = shape.num_slots
        self._watch = watch
        self._readers_bell = readers_bell
        self._writer_bell = writer_bell
        self._spill = SpillWriter(me.name)
        self._next = 0
        self._limit = shape.num_slots  # the first frame number for which there is no space as far as is known
        self.peers = {r: Peer(name, seats.readers[r], seats, watch) for r, name in enumerate(readers)}
        assert len(self.peers) == shape.num_readers
        seats.take(seats.writer, me)

    def put(self, parts: Sequence[Part], *, deadline_s: float) -> None:
        """Give every reader a copy of the parts. Blocks while the ring is full, at most `deadline_s` seconds.

        Raises DeadlineError naming the slowest reader, PeerDiedError naming a reader that is dead (until `forget`).
        After an error nothing was put.
        """
        self.await_space(deadline_s)
        write_frame(self._slot(), parts, self._segment_of)
        self.publish()

    def put_now(self, parts: Sequence[Part]) -> None:
        """The same, waiting for nobody, dead or alive: see `reserve`."""
        self._expect_space()
        write_frame(self._slot(), parts, self._segment_of)
        self.publish()

    def await_space(self, deadline_s: float) -> None:
        """Block until the next `put` does not. Raises what that would."""
        if self._watch.dead:
            self._check_readers()
        if self._next >= self._limit:
            self._wait_for_space(deadline_s)

    def reserve(self, lengths: Sequence[int]) -> list[memoryview]:
        """Memory for the parts of the next frame, which no reader sees before `publish`.

        For who knows that there is space, such as the relay, whose sender counts: raises FrameError if there is none.
        """
        self._expect_space()
        return lay_out(self._slot(), lengths, self._segment_of)

    def publish(self) -> None:
        """Show the readers the frame whose parts are written."""
        number = self._next
        self._fence()
        self._words[self._seats.sequence_words[number % self._num_slots]] = number + 1
        self._next = number + 1
        self._fence()
        self._readers_bell.ring()

    def passed(self, *, tell: bool) -> tuple[int, int]:
        """How many frames every reader is done with, and which reader is the last. Neither waits nor raises.

        Of what is not counted yet the readers ring `writer_bell`, if `tell`.
        """
        self._words[self._seats.writer + _WRITER_WAITS] = tell
        self._fence()
        words, readers = self._words, self._seats.readers
        return min(((words[readers[r] + _CURSOR], r) for r in self.peers), default=(self._next, 0))

    def expect(self, reader: int, party: Party) -> None:
        """Watch the process that will attach as `reader`."""
        self.peers[reader].expect(party)

    def forget(self, reader: int) -> None:
        """Go on without `reader`. If it lives after all, it gets an error from its next poll."""
        if reader in self.peers:
            # Replaced, not changed: the relay's receiving thread may be looking at it.
            self.peers = {r: peer for r, peer in self.peers.items() if r != reader}
            self._words[self._seats.readers[reader] + _STATE] = _FORGOTTEN
            self._limit = self._num_passed() + self._num_slots

    def close(self) -> None:
        """Tell the readers that no more comes, and free the segments of large frames."""
        self._words[self._seats.writer + _STATE] = _CLOSED
        self._fence()
        self._readers_bell.ring()
        self._spill.close()

    def _slot(self) -> memoryview:
        """Of the next frame, for which there is space."""
        if self._spill:
            self._spill.reclaim(self._num_passed())
        return self._seats.slots[self._next % self._num_slots]

    def _expect_space(self) -> None:
        if self._next >= self._limit and not self._has_space():
            raise FrameError(f"frame number {self._next} for a ring that has no space for it")

    def _segment_of(self, size_bytes: int) -> tuple[SegmentHandle, memoryview]:
        segment = self._spill.segment(self._next, size_bytes)
        return segment.handle, segment.buf

    def _num_passed(self) -> int:
        """Number of frames that every reader is done with.

        Overwriting their slots needs no fence after this: it depends on a branch on what is read here, and no machine
        shows stores before the branch that they depend on is decided.
        """
        words, readers = self._words, self._seats.readers
        return min((words[readers[r] + _CURSOR] for r in self.peers), default=self._next)

    def _has_space(self) -> bool:
        self._limit = self._num_passed() + self._num_slots
        return self._next < self._limit

    def _wait_for_space(self, deadline_s: float) -> None:
        if self._has_space():
            return
        started = time.monotonic()
        waits = self._seats.writer + _WRITER_WAITS
        self._words[waits] = 1
        try:
            while True:
                seen = self._writer_bell.value()
                self._fence()
                if self._has_space():
                    return
                self._check_readers()
                waited_s = time.monotonic() - started
                if waited_s >= deadline_s:
                    raise DeadlineError(f"space in a ring of {self._num_slots} frames", self._slowest(), waited_s)
                self._writer_bell.wait(seen, deadline_s - waited_s)
        finally:
            self._words[waits] = 0

    def _check_readers(self) -> None:
        for peer in self.peers.values():
            death = peer.death()
            if death is not None:
                raise death

    def _slowest(self) -> str:
        return str(self.peers[min(self.peers, key=self._cursor)])

    def _cursor(self, reader: int) -> int:
        return self._words[self._seats.readers[reader] + _CURSOR]


class RingReader:
    """The end that gets frames. One thread. Never blocks: who waits does so on a bell, for several rings perhaps."""

    def __init__(
        self,
        memory: memoryview,
        shape: RingShape,
        *,
        reader: int,
        writer: str,
        watch: Watch,
        writer_bell: Doorbell,
    ) -> None:
        """`memory`: what `format_ring` made. `writer`: its name. Raises FrameError if it is something else."""
        self._seats = seats = _Seats(memory, shape)
        self._words, self._fence = seats.words, seats.fence
        self._num_slots = shape.num_slots
        self._line = seats.readers[reader]
        self._writer_waits = seats.writer + _WRITER_WAITS
        self._writer_bell = writer_bell
        self._spill = SpillReader()
        self._cursor = 0
        self._awaited = seats.sequence_words[0]
        self._holds = False
        self.peer = Peer(writer, seats.writer, seats, watch)

    def attach(self, me: Party) -> None:
        """Say who reads."""
        self._seats.take(self._line, me)
        self._fence()
        self._writer_bell.ring()

    def poll(self) -> list[memoryview] | None:
        """The parts of the next frame, None if there is none yet. They are valid until `release` or the next call.

        Raises FrameError if the writer went on without this reader, or for bytes that are no frame; PeerDiedError if
        the frame is a large one and its writer, which held it, is gone.
        """
        if self._holds:
            self.release()
        cursor = self._cursor
        sequence = self._words[self._awaited]
        if sequence != cursor + 1:
            if sequence > cursor + 1 or self._words[self._line + _STATE] == _FORGOTTEN:
                raise FrameError(f"{self.peer} went on without this reader, which had read {cursor} frames")
            return None
        self._fence()
        self._holds = True
        return read_frame(self._seats.slots[cursor % self._num_slots], self._memory_of)

    def release(self) -> None:
        """Let the writer have the space of the frame that `poll` gave. Without one does nothing."""
        if not self._holds:
            return
        self._holds = False
        self._cursor = cursor = self._cursor + 1
        self._awaited = self._seats.sequence_words[cursor % self._num_slots]
        self._fence()
        self._words[self._line + _CURSOR] = cursor
        self._fence()
        if self._words[self._writer_waits]:
            self._writer_bell.ring()

    def close(self) -> None:
        """Tell the writer that nobody reads any more."""
        self._words[self._line + _STATE] = _CLOSED
        self._fence()
        self._writer_bell.ring()
        self._spill.close()

    def _memory_of(self, fd: int, size_bytes: int, nonce: int) -> memoryview:
        pid = self._words[self._seats.writer + _PID]
        return self._spill.memory(SegmentHandle(pid, fd, size_bytes, nonce, f"large frame of {self.peer.name}"))
