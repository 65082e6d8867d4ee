"""The control plane of one node: commands from the brain to its workers, replies from each worker to the brain.

One shared segment holds two doorbells, a ring of commands that every worker reads, and a ring of replies for each
worker. Whatever the brain may wait for (a reply, space for a command) rings the brain's bell, so that it sleeps in one
place; the other bell is the workers'.

A message is a msgspec struct; beside it a frame may carry buffers (tensors), which are copied once, into shared memory,
and come out as views of it. What `get` returns, message included, may be such views: it is valid until the next `get`,
which is when the sender may use that memory again. An end is for one thread; only `close` may come from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import msgspec

from phalanx.errors import PeerDiedError
from phalanx.transport.codec import Codec
from phalanx.transport.frame import Part
from phalanx.transport.futex import Doorbell, spin_s_for
from phalanx.transport.liveness import Party, Watch
from phalanx.transport.ring import RingReader, RingShape, RingWriter, format_ring
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.transport.waiter import SpinTime, Waiter

if TYPE_CHECKING:
    from typing_extensions import Buffer

C = TypeVar("C")
R = TypeVar("R")

_BELL_BYTES = 64  # a cache line each


class QueueShape(msgspec.Struct, frozen=True):
    """How much a queue holds, each way. `slot_bytes` is a multiple of 64; larger frames have memory of their own."""

    slot_bytes: int = 64 * 1024
    num_slots: int = 16


DEFAULT_SHAPE = QueueShape()
BRAIN = "brain"


class QueueHandle(msgspec.Struct, frozen=True):
    """What worker number `reader` needs to attach. Travels to it through its launcher."""

    segment: SegmentHandle
    brain: Party
    reader: int
    name: str
    num_readers: int
    shape: QueueShape
    long_spin_s: float


class _Layout:
    """Where everything is in the queue's segment."""

    def __init__(self, num_readers: int, shape: QueueShape) -> None:
        self.commands = RingShape(shape.slot_bytes, shape.num_slots, num_readers)
        self.replies = RingShape(shape.slot_bytes, shape.num_slots, 1)
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


class MessageQueue(Generic[C, R]):
    """The brain's end. Owns the memory; idle, it takes no CPU."""

    def __init__(
        self,
        readers: Sequence[str],
        *,
        command_type: type[C] | Any,
        reply_type: type[R] | Any,
        shape: QueueShape = DEFAULT_SHAPE,
        name: str = BRAIN,
        long_spin_s: float = 0.0,
    ) -> None:
        """Make the queue for workers that are called `readers` ("rank 0", …), none of which runs yet.

        Types are msgspec structs or unions of tagged ones; one that msgspec cannot handle is a TypeError here. It takes
        (1 + number of readers) × num_slots × slot_bytes of memory, page by page when first used. `name` is this end's;
        `long_spin_s` is for the workers: see SpinTime.
        """
        self._codec = Codec[C, R](command_type, reply_type)
        self._layout = layout = _Layout(len(readers), shape)
        self._shape = shape
        self._names = tuple(readers)
        self._me = Party.me(name)
        self._segment = SharedSegment.create(layout.size_bytes, f"queue of {name}")
        buf = self._segment.buf
        self.bell, workers_bell = layout.bells(buf)
        self._watch = Watch(self.bell)
        self._waiter = Waiter(self.bell, SpinTime(spin_s_for(len(readers) + 1)))
        self._long_spin_s = long_spin_s
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

    def handle(self, reader: int) -> QueueHandle:
        """What worker number `reader` attaches with."""
        return QueueHandle(
            self._segment.handle,
            self._me,
            reader,
            self._names[reader],
            len(self._names),
            self._shape,
            self._long_spin_s,
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
        found = self.poll()
        if found is not None:
            return found
        return self._waiter.wait_for(
            self._poll,
            death=self.death,
            until=lambda: self._is_closed or (until is not None and until()),
            timeout_s=timeout_s,
        )

    def poll(self) -> tuple[int, R, list[memoryview]] | None:
        """A reply if one is there, as `get`. For who waits for this queue and for something else."""
        self._release()
        return self._poll()

    def death(self) -> PeerDiedError | None:
        """What `get` raises when nothing is there. Everything that the dead worker sent is there after this call."""
        for ring in self._replies.values():
            death = ring.peer.death()
            if death is not None:
                return death
        return None

    def await_space(self, *, deadline_s: float) -> None:
        """Block until the next `put` does not. Raises what that would."""
        assert not self._is_closed
        self._commands.await_space(deadline_s)

    def put_frame(self, parts: Sequence[Part], *, deadline_s: float) -> None:
        """As `put`, of a frame that another queue encoded."""
        assert not self._is_closed
        self._commands.put(parts, deadline_s=deadline_s)

    def put_frame_now(self, parts: Sequence[Part]) -> None:
        """The same, waiting for nobody, dead or alive. Raises FrameError if there is no space."""
        assert not self._is_closed
        self._commands.put_now(parts)

    def reserve(self, lengths: Sequence[int]) -> list[memoryview]:
        """Memory for the parts of such a frame, which is sent by `publish`. Waits and raises as `put_frame_now`."""
        assert not self._is_closed
        return self._commands.reserve(lengths)

    def publish(self) -> None:
        """Send what `reserve` gave the memory for."""
        self._commands.publish()

    def frames(self) -> Iterator[tuple[int, list[memoryview]]]:
        """The replies that are there, not decoded, each with whose it is and valid until the next. Instead of `get`."""
        for reader, ring in list(self._replies.items()):
            while True:
                try:
                    parts = ring.poll()
                except PeerDiedError:
                    continue  # with a worker went a large frame that nobody had read; that it died is noticed too
                if parts is None:
                    break
                yield reader, parts

    def give_up(self) -> None:
        """All workers are being ended: they count as dead from now on, however long their ends take. For any thread."""
        self._watch.give_up()

    def deaths(self) -> list[tuple[int, PeerDiedError]]:
        """Workers that died or closed their ends, and are not forgotten. What they sent is there after this call."""
        found = ((reader, ring.peer.death()) for reader, ring in self._replies.items())
        return [(reader, death) for reader, death in found if death is not None]

    def passed(self, *, tell: bool) -> tuple[int, int]:
        """How many commands every worker is done with, and which worker is the last.

        From now on the bell rings with every command that a worker is done with if `tell`, and does not if not.
        """
        return self._commands.passed(tell=tell)

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turns_of_all(self) -> list[list[tuple[int, RingReader]]]:
        """For each worker the order that begins after it: who replies fast does not hide the others."""
        rings = list(self._replies.items())
        return [rings[i:] + rings[:i] for i in range(len(rings))] or [[]]

    def _release(self) -> None:
        assert not self._is_closed
        if self._held is not None:
            self._held.release()
            self._held = None

    def _poll(self) -> tuple[int, R, list[memoryview]] | None:
        found = self._poll_frame()
        if found is None:
            return None
        reader, ring, parts = found
        message, buffers = self._codec.decode(parts, ring.peer)
        return reader, message, buffers

    def _poll_frame(self) -> tuple[int, RingReader, list[memoryview]] | None:
        turns = self._turns
        for reader, ring in turns[0]:
            parts = ring.poll()
            if parts is not None:
                turns.append(turns.pop(0))
                self._held = ring
                return reader, ring, parts
        return None


class WorkerEndpoint(Generic[C, R]):
    """A worker's end."""

    def __init__(self, handle: QueueHandle, codec: Codec[R, C]) -> None:
        """Use `attach`."""
        layout = _Layout(handle.num_readers, handle.shape)
        self._segment = SharedSegment.attach(handle.segment)
        buf = self._segment.buf
        brain_bell, self.bell = layout.bells(buf)
        self._watch = Watch(self.bell)
        self._codec = codec
        self._waiter = Waiter(self.bell, SpinTime(spin_s_for(handle.num_readers + 1), handle.long_spin_s))
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
        return cls(handle, Codec[R, C](reply_type, command_type))

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def _poll(self) -> tuple[C, list[memoryview]] | None:
        parts = self._commands.poll()
        return None if parts is None else self._codec.decode(parts, self._commands.peer)
