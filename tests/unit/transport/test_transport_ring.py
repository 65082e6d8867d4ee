from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.futex import Doorbell
from phalanx.transport.liveness import Party, Watch
from phalanx.transport.ring import RingReader, RingShape, RingWriter, format_ring

SLOT_BYTES = 256
ROOM = SLOT_BYTES - 64


class Ring:
    """A writer and its readers in one process."""

    def __init__(self, num_slots: int, num_readers: int) -> None:
        self.shape = RingShape(SLOT_BYTES, num_slots, num_readers)
        self.memory = memoryview(bytearray(self.shape.size_bytes))
        format_ring(self.memory, self.shape)
        self.bell = Doorbell(memoryview(bytearray(4)))
        self.watch = Watch(self.bell)
        self.me = Party.me("brain")
        self.writer = RingWriter(
            self.memory,
            self.shape,
            me=self.me,
            readers=[f"rank {r}" for r in range(num_readers)],
            watch=self.watch,
            readers_bell=self.bell,
            writer_bell=self.bell,
        )
        self.readers = [self.reader(r) for r in range(num_readers)]

    def reader(self, index: int) -> RingReader:
        return RingReader(
            self.memory, self.shape, reader=index, writer="brain", watch=self.watch, writer_bell=self.bell
        )

    def attach_all(self) -> None:
        for r, reader in enumerate(self.readers):
            reader.attach(Party.me(f"rank {r}"))

    def close(self) -> None:
        self.writer.close()
        for reader in self.readers:
            reader.close()
        self.watch.close()


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(num_slots=2, num_readers=2)
    yield made
    made.close()


def _taken(reader: RingReader) -> list[bytes] | None:
    parts = reader.poll()
    copies = None if parts is None else [bytes(part) for part in parts]
    reader.release()
    return copies


sizes = st.one_of(st.integers(0, 20), st.integers(ROOM - 65, ROOM + 65), st.integers(0, 3000))
frames = st.lists(st.builds(lambda n, fill: bytes([fill]) * n, sizes, st.integers(0, 255)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(
    num_slots=st.integers(1, 4),
    num_readers=st.integers(1, 4),
    turns=st.lists(st.tuples(st.integers(0, 4), frames), max_size=60),
)
def test_every_reader_gets_every_frame_in_order(
    num_slots: int, num_readers: int, turns: list[tuple[int, list[bytes]]]
) -> None:
    ring = Ring(num_slots, num_readers)
    sent: list[list[bytes]] = []
    got: list[list[list[bytes]]] = [[] for _ in range(num_readers)]
    for who, frame in turns:
        if who == 0:
            if len(sent) - min(map(len, got)) < num_slots:
                ring.writer.put(frame, deadline_s=0)
                sent.append(frame)
            else:
                with pytest.raises(DeadlineError):
                    ring.writer.put(frame, deadline_s=0)
        elif who <= num_readers:
            taken = _taken(ring.readers[who - 1])
            assert (taken is None) == (len(got[who - 1]) == len(sent))
            if taken is not None:
                got[who - 1].append(taken)
    for reader, frames_of_reader in zip(ring.readers, got, strict=True):
        while (taken := _taken(reader)) is not None:
            frames_of_reader.append(taken)
        assert frames_of_reader == sent
    ring.close()


def test_parts_stay_until_they_are_released(ring: Ring) -> None:
    reader = ring.readers[0]
    for n in (1, 2):
        ring.writer.put([bytes([n]) * 10], deadline_s=0)
    parts = reader.poll()
    assert parts is not None
    _taken(ring.readers[1])
    with pytest.raises(DeadlineError):
        ring.writer.put([b"three"], deadline_s=0)
    assert bytes(parts[0]) == b"\x01" * 10
    reader.release()
    ring.writer.put([b"three"], deadline_s=0)


def test_parts_begin_at_cache_lines(ring: Ring) -> None:
    ring.writer.put([b"head", b"tensor", b"other"], deadline_s=0)
    parts = ring.readers[0].poll()
    assert parts is not None
    whole = ring.memory.nbytes
    starts = [ring.memory.obj.find(bytes(part)) for part in parts]  # type: ignore[attr-defined]
    assert all(0 < start < whole and start % 64 == 0 for start in starts)


def test_a_full_ring_names_the_slowest_reader(ring: Ring) -> None:
    ring.attach_all()
    for _ in range(2):
        ring.writer.put([b"x"], deadline_s=0)
    _taken(ring.readers[0])
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rank 1 \(pid \d+\)"):
        ring.writer.put([b"x"], deadline_s=0.05)
    assert 0.05 <= time.monotonic() - started < 1


def test_a_reader_that_never_attached_is_named_so(ring: Ring) -> None:
    for _ in range(2):
        ring.writer.put([b"x"], deadline_s=0)
    with pytest.raises(DeadlineError, match=r"rank 0 .*never attached"):
        ring.writer.put([b"x"], deadline_s=0)


def test_a_writer_that_waits_is_woken_by_the_last_reader(ring: Ring) -> None:
    for _ in range(2):
        ring.writer.put([b"x"], deadline_s=0)
    put = threading.Thread(target=ring.writer.put, args=([b"last"],), kwargs={"deadline_s": 10})
    put.start()
    for reader in ring.readers:
        assert _taken(reader) == [b"x"]
    put.join(10)
    assert not put.is_alive()


def test_a_dead_reader_is_an_error_until_it_is_forgotten(ring: Ring) -> None:
    died = Party("rank 1", ring.me.pid, ring.me.start_time - 1)
    ring.writer.expect(1, died)
    for _ in range(2):
        with pytest.raises(PeerDiedError, match="rank 1"):
            ring.writer.put([b"x"], deadline_s=1)
    ring.writer.forget(1)
    for _ in range(5):
        ring.writer.put([b"x"], deadline_s=0)
        assert _taken(ring.readers[0]) == [b"x"]


def test_a_reader_that_was_forgotten_is_told_so(ring: Ring) -> None:
    ring.writer.forget(1)
    for _ in range(5):
        ring.writer.put([b"x"], deadline_s=0)
        _taken(ring.readers[0])
    with pytest.raises(FrameError, match="without this reader"):
        ring.readers[1].poll()


def test_all_readers_are_forgotten(ring: Ring) -> None:
    ring.writer.forget(0)
    ring.writer.forget(1)
    for _ in range(5):
        ring.writer.put([b"x"], deadline_s=0)


def test_a_large_frame_takes_no_slot_and_its_memory_is_used_again(ring: Ring) -> None:
    segments = set()
    for n in range(4):
        ring.writer.put([b"head", bytes([n]) * 10_000], deadline_s=0)
        segments.add(ring.writer._spill._in_flight[-1][1].handle.nonce)
        for reader in ring.readers:
            assert _taken(reader) == [b"head", bytes([n]) * 10_000]
    assert len(segments) == 1


def test_too_many_parts_for_a_slot(ring: Ring) -> None:
    with pytest.raises(FrameError, match="100 parts"):
        ring.writer.put([b""] * 100, deadline_s=0)


def test_a_closed_writer_is_seen_after_its_frames(ring: Ring) -> None:
    reader = ring.readers[0]
    ring.writer.put([b"last"], deadline_s=0)
    ring.writer.close()
    assert reader.peer.death() is not None
    assert _taken(reader) == [b"last"]


def test_memory_of_another_shape_is_refused(ring: Ring) -> None:
    ring.shape = msgspec.structs.replace(ring.shape, num_slots=1)
    with pytest.raises(FrameError, match="num_slots=1"):
        ring.reader(0)
