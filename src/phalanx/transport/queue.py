"""The control plane of one node: commands from the brain to its workers, replies from each worker to the brain.

One shared segment holds two doorbells, a ring of commands that every worker reads, and a ring of replies for each
worker. Whatever the brain may wait for (a reply, space for a command) rings the brain's bell, so that it sleeps in one
place; the other bell is the workers'.

A message is a msgspec struct; beside it a frame may carry buffers (tensors), which are copied once, into shared memory,
and come out as views of it. What `get` returns, message included, may be such views: it is valid until the next `get`,
which is when the sender may use that memory again. An end is for one thread; only `close` may come from another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import msgspec

from phalanx.errors import FrameError, PeerDiedError
from phalanx.transport.frame import Part, as_part
from phalanx.transport.futex import Doorbell, new_fence, spin_s_for
from phalanx.transport.liveness import Party, Watch
from phalanx.transport.ring import Peer, RingReader, RingShape, RingWriter, format_ring
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

if TYPE_CHECKING:
    from typing_extensions import Buffer

C = TypeVar("C")
R = TypeVar("R")
Sent = TypeVar("Sent")
Received = TypeVar("Received")
Found = TypeVar("Found")

_BELL_BYTES = 64  # a cache line each
_POLLS_PER_YIELD = range(4)


class QueueHandle(msgspec.Struct, frozen=True):
    """What worker number `reader` needs to attach. Travels to it through its launcher."""

    segment: SegmentHandle
    brain: Party
    reader: int
    name: str
    num_readers: int
    slot_bytes: int
    num_slots: int


class _Layout:
    """Where everything is in the queue's segment."""

    def __init__(self, num_readers: int, slot_bytes: int, num_slots: int) -> None:
        self.commands = RingShape(slot_bytes, num_slots, num_readers)
        self.replies = RingShape(slot_bytes, num_slots, 1)
        self._commands_at = 2 * _BELL_BYTES
        self._replies_at = self._commands_at + self.commands.size_bytes
        self.size_bytes = self._replies_at + num_readers * self.replies.size_bytes

    def bells(self, buf: memoryview) -> tuple[Doorbell, Doorbell]:
        """The brain's and the workers'."""
        return Doorbell(buf[:4]), Doorbell(buf[_BELL_BYTES : _BELL_BYTES + 4])

    def command_ring(self, buf: memoryview) -> memoryview:
        return buf[self._commands_at : self._replies_at]

    def reply_ring(self, buf: memoryview, reader: int) -> memoryview:
        start = self._replies_at + reader * self.replies.size_bytes
        return buf[start : start + self.replies.size_bytes]


class _Codec(Generic[Sent, Received]):
    """Messages to the parts of a frame, and back: the encoded message first, then the buffers."""

    def __init__(self, received_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received_type)
        self._head = bytearray()
        self._head_alone = (self._head,)

    def encode(self, message: Sent, buffers: Sequence[Buffer]) -> Sequence[Part]:
        """Parts that are valid until the next call."""
        self._encoder.encode_into(message, self._head)
        return (self._head, *map(as_part, buffers)) if buffers else self._head_alone

    def decode(self, parts: list[memoryview], sender: Peer) -> tuple[Received, list[memoryview]]:
        """The message, and the buffers as views of the ring."""
        try:
            return self._decoder.decode(parts[0]), parts[1:]
        except msgspec.MsgspecError as error:
            raise FrameError(f"a message from {sender} that is none of ours: {error}") from error


class _Waiter:
    """How an end waits for frames: it spins for a bounded time, yielding its core, then sleeps on its bell."""

    def __init__(self, bell: Doorbell, spin_s: float) -> None:
        self._bell = bell
        self._fence = new_fence()
        self._spin_s = spin_s

    def wait_for(
        self,
        poll: Callable[[], Found | None],
        *,
        death: Callable[[], PeerDiedError | None],
        until: Callable[[], bool],
        timeout_s: float | None,
    ) -> Found | None:
        """What `poll` finds. None after `timeout_s` or as soon as `until()`. Raises what `death` returns."""
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        if self._spin_s and timeout_s != 0:
            found = self._spin(poll, started + self._spin_s)
            if found is not None:
                return found
        while True:
            seen = self._bell.value()
            self._fence()
            gone = death()  # before the poll, which then finds everything that a dead party had sent
            found = poll()
            if found is not None:
                return found
            if gone is not None:
                raise gone
            if until():
                return None
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return None
            self._bell.wait(seen, remaining_s)

    def _spin(self, poll: Callable[[], Found | None], end: float) -> Found | None:
        # Polls rather than looks at the bell: a frame can be seen about a microsecond before its bell rings.
        while True:
            for _ in _POLLS_PER_YIELD:
                found = poll()
                if found is not None:
                    return found
            if time.monotonic() >= end:
                return None
            os.sched_yield()


class MessageQueue(Generic[C, R]):
    """The brain's end. Owns the memory; idle, it takes no CPU."""

    def __init__(self, readers: Sequence[str], *, reply_type: Any, slot_bytes: int, num_slots: int, name: str) -> None:
        """Use `create`."""
        self._layout = layout = _Layout(len(readers), slot_bytes, num_slots)
        self._names = tuple(readers)
        self._me = Party.me(name)
        self._segment = SharedSegment.create(layout.size_bytes, f"queue of {name}")
        buf = self._segment.buf
        self.bell, workers_bell = layout.bells(buf)
        self._watch = Watch(self.bell)
        self._codec = _Codec[C, R](reply_type)
        self._waiter = _Waiter(self.bell, spin_s_for(len(readers) + 1))
        format_ring(layout.command_ring(buf), layout.commands)
        self._commands = RingWriter(
            layout.command_ring(buf),
            layout.commands,
            me=self._me,
            readers=readers,
            watch=self._watch,
            readers_bell=workers_bell,
            writer_bell=self.bell,
        )
        self._replies: dict[int, RingReader] = {}
        for reader, reader_name in enumerate(readers):
            memory = layout.reply_ring(buf, reader)
            format_ring(memory, layout.replies)
            self._replies[reader] = ring = RingReader(
                memory, layout.replies, reader=0, writer=reader_name, watch=self._watch, writer_bell=workers_bell
            )
            ring.attach(self._me)
        self._turns = self._turns_of_all()
        self._held: RingReader | None = None
        self._is_closed = False

    @classmethod
    def create(
        cls,
        readers: Sequence[str],
        *,
        command_type: type[C] | Any,
        reply_type: type[R] | Any,
        slot_bytes: int = 64 * 1024,
        num_slots: int = 16,
        name: str = "brain",
    ) -> Self:
        """Make the queue for workers that are called `readers` ("rank 0", …), none of which runs yet.

        Types are msgspec structs or unions of tagged ones; one that msgspec cannot handle is a TypeError here. It takes
        (1 + number of readers) × num_slots × slot_bytes of memory, page by page when first used. `slot_bytes` is a
        multiple of 64; larger frames travel in memory of their own.
        """
        msgspec.msgpack.Decoder(command_type)
        return cls(readers, reply_type=reply_type, slot_bytes=slot_bytes, num_slots=num_slots, name=name)

    def handle(self, reader: int) -> QueueHandle:
        """What worker number `reader` attaches with."""
        shape = self._layout.commands
        return QueueHandle(
            self._segment.handle,
            self._me,
            reader,
            self._names[reader],
            shape.num_readers,
            shape.slot_bytes,
            shape.num_slots,
        )

    def expect(self, reader: int, party: Party) -> None:
        """Watch the process that will attach as `reader`: its death before that is noticed too."""
        self._commands.expect(reader, party)
        self._replies[reader].peer.expect(party)

    def put(self, message: C, buffers: Sequence[Buffer] = (), *, deadline_s: float) -> None:
        """Send to all workers. Blocks only while a worker is `num_slots` frames behind.

        Raises DeadlineError naming the slowest worker, PeerDiedError naming one that died, each time until `forget`.
        After an error nothing was sent.
        """
        assert not self._is_closed
        self._commands.put(self._codec.encode(message, buffers), deadline_s=deadline_s)

    def get(
        self, *, timeout_s: float | None, until: Callable[[], bool] | None = None
    ) -> tuple[int, R, list[memoryview]] | None:
        """The next reply: the worker's number, the message, and its buffers, which are valid until the next `get`.

        Replies of one worker come in its order. None after `timeout_s` (0 polls, None waits for as long as it takes),
        or as soon as `until()` holds; who makes it hold rings `bell`. Raises PeerDiedError naming a worker that died or
        closed its end, after all replies that are there, each time until `forget`; FrameError for what is no reply.
        """
        assert not self._is_closed
        if self._held is not None:
            self._held.release()
            self._held = None
        found = self._poll()
        if found is not None:
            return found
        return self._waiter.wait_for(
            self._poll,
            death=self._death,
            until=lambda: self._is_closed or (until is not None and until()),
            timeout_s=timeout_s,
        )

    def forget(self, reader: int) -> None:
        """Go on without this worker: it gets no more commands, and its replies are dropped."""
        self._commands.forget(reader)
        ring = self._replies.pop(reader, None)
        if ring is not None:
            ring.close()
            self._turns = self._turns_of_all()

    def close(self) -> None:
        """Let go of the workers, which get PeerDiedError from now on, and of the memory.

        May be called more than once, and while another thread sleeps in `get`, which then returns None.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._watch.close()
        self._commands.close()
        for ring in self._replies.values():
            ring.close()
        self._segment.close()
        self.bell.ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turns_of_all(self) -> list[list[tuple[int, RingReader]]]:
        """For each worker the order that begins after it: who replies fast does not hide the others."""
        rings = list(self._replies.items())
        return [rings[i:] + rings[:i] for i in range(len(rings))] or [[]]

    def _poll(self) -> tuple[int, R, list[memoryview]] | None:
        turns = self._turns
        for reader, ring in turns[0]:
            parts = ring.poll()
            if parts is not None:
                turns.append(turns.pop(0))
                self._held = ring
                message, buffers = self._codec.decode(parts, ring.peer)
                return reader, message, buffers
        return None

    def _death(self) -> PeerDiedError | None:
        for ring in self._replies.values():
            death = ring.peer.death()
            if death is not None:
                return death
        return None


class WorkerEndpoint(Generic[C, R]):
    """A worker's end."""

    def __init__(self, handle: QueueHandle, command_type: Any) -> None:
        """Use `attach`."""
        layout = _Layout(handle.num_readers, handle.slot_bytes, handle.num_slots)
        self._segment = SharedSegment.attach(handle.segment)
        buf = self._segment.buf
        brain_bell, self.bell = layout.bells(buf)
        self._watch = Watch(self.bell)
        self._codec = _Codec[R, C](command_type)
        self._waiter = _Waiter(self.bell, spin_s_for(handle.num_readers + 1))
        me = Party.me(handle.name)
        self._replies = RingWriter(
            layout.reply_ring(buf, handle.reader),
            layout.replies,
            me=me,
            readers=[handle.brain.name],
            watch=self._watch,
            readers_bell=brain_bell,
            writer_bell=self.bell,
        )
        self._commands = RingReader(
            layout.command_ring(buf),
            layout.commands,
            reader=handle.reader,
            writer=handle.brain.name,
            watch=self._watch,
            writer_bell=brain_bell,
        )
        self._commands.peer.expect(handle.brain)
        self._commands.attach(me)
        self._is_closed = False

    @classmethod
    def attach(cls, handle: QueueHandle, *, command_type: type[C] | Any, reply_type: type[R] | Any) -> Self:
        """Take the worker's place. Commands that were sent before are not lost.

        Raises PeerDiedError if the brain is gone, FrameError if it closed the queue.
        """
        msgspec.msgpack.Decoder(reply_type)
        return cls(handle, command_type)

    def get(self, *, timeout_s: float | None) -> tuple[C, list[memoryview]] | None:
        """The next command and its buffers, which are valid until the next `get`. None after `timeout_s` (0 polls, None
        waits for as long as it takes).

        Raises PeerDiedError when the brain died or closed the queue, after all commands that are there; FrameError if
        the brain went on without this worker, or for what is no command.
        """
        assert not self._is_closed
        self._commands.release()
        found = self._poll()
        if found is not None:
            return found
        return self._waiter.wait_for(
            self._poll,
            death=self._commands.peer.death,
            until=lambda: self._is_closed,
            timeout_s=timeout_s,
        )

    def put(self, message: R, buffers: Sequence[Buffer] = (), *, deadline_s: float) -> None:
        """Send to the brain. Blocks only while it is `num_slots` behind. Raises DeadlineError, PeerDiedError."""
        assert not self._is_closed
        self._replies.put(self._codec.encode(message, buffers), deadline_s=deadline_s)

    def close(self) -> None:
        """Leave: the brain gets PeerDiedError once it has read what was sent (but large frames go with their sender).

        May be called more than once, and while another thread sleeps in `get`, which then returns None.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._watch.close()
        self._commands.close()
        self._replies.close()
        self._segment.close()
        self.bell.ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _poll(self) -> tuple[C, list[memoryview]] | None:
        parts = self._commands.poll()
        return None if parts is None else self._codec.decode(parts, self._commands.peer)
