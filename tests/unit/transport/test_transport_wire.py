"""Frames over an encrypted stream: they arrive whole and in order, and nothing else arrives."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

import pytest

from phalanx.errors import FrameError
from phalanx.transport.link_messages import Alive, Note, Passed
from phalanx.transport.noise import TAG_BYTES, CipherState
from phalanx.transport.wire import WireReader, WireWriter, encode_note

KEY = bytes(32)


class Sink:
    """Keeps what comes."""

    def __init__(self) -> None:
        self.frames: list[tuple[list[bytes], int, int]] = []
        self.notes: list[Note] = []
        self._room: list[memoryview] = []

    def take_frame(self, parts: list[memoryview], rank: int, num_passed: int) -> None:
        self.frames.append((list(map(bytes, parts)), rank, num_passed))

    def make_room(self, lengths: Sequence[int]) -> list[memoryview]:
        self._room = [memoryview(bytearray(length)) for length in lengths]
        return self._room

    def take_filled(self, rank: int, num_passed: int) -> None:
        self.take_frame(self._room, rank, num_passed)

    def take_note(self, note: Note) -> None:
        self.notes.append(note)


class Wire:
    """A writer, a reader, and between them a hand on the bytes."""

    def __init__(self) -> None:
        self.sink = Sink()
        out, self._tapped = socket.socketpair()
        self.input, into = socket.socketpair()
        self._sockets = [out, self._tapped, self.input, into]
        self.writer = WireWriter(out, CipherState(KEY))
        self.reader = WireReader(into, CipherState(KEY), self.sink)

    def recorded(self, parts: Sequence[bytes]) -> bytearray:
        """The bytes of one small frame."""
        self.writer.send_frame(parts)
        return bytearray(self._tapped.recv(1 << 20))

    def feed(self, data: bytes | bytearray) -> None:
        self.input.sendall(data)
        self.reader.read()

    def close(self) -> None:
        for end in self._sockets:
            end.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


@pytest.fixture
def ends() -> Iterator[tuple[WireWriter, WireReader, Sink]]:
    out, into = socket.socketpair()
    sink = Sink()
    with out, into:
        yield WireWriter(out, CipherState(KEY)), WireReader(into, CipherState(KEY), sink), sink


def _parts(seed: int) -> list[bytes]:
    source = random.Random(seed)
    sizes = [source.choice([0, 1, 100, 16_000, 131_072, 131_073, 800_000]) for _ in range(source.randrange(1, 5))]
    return [source.randbytes(size) for size in sizes]


def test_frames_of_all_sizes_arrive_in_order(ends: tuple[WireWriter, WireReader, Sink]) -> None:
    writer, reader, sink = ends
    frames = [_parts(seed) for seed in range(60)]

    def send() -> None:
        for number, parts in enumerate(frames):
            writer.send_frame(parts, rank=number % 7, num_passed=number)
            writer.send_note(Passed(number, 3))

    sender = threading.Thread(target=send)
    sender.start()
    while len(sink.notes) < len(frames):
        assert reader.read() > 0
    sender.join()
    assert sink.frames == [(parts, number % 7, number) for number, parts in enumerate(frames)]
    assert sink.notes == [Passed(number, 3) for number in range(len(frames))]


@pytest.mark.parametrize("size_bytes", [10, 5000, 16_000, 300_000])
def test_frames_that_are_sent_together_arrive_apart(ends: tuple[WireWriter, WireReader, Sink], size_bytes: int) -> None:
    writer, reader, sink = ends
    frames = [[bytes([number]) * size_bytes, b"tail"] for number in range(20)]

    def send() -> None:
        for number, parts in enumerate(frames):
            writer.send_frame(parts, rank=number, more=number % 19 > 0)
        writer.send_frame([b"no more"], more=True)
        writer.flush()

    sender = threading.Thread(target=send)
    sender.start()
    while len(sink.frames) <= len(frames):
        assert reader.read() > 0
    sender.join()
    assert sink.frames == [(parts, number, 0) for number, parts in enumerate(frames)] + [([b"no more"], 0, 0)]


def test_a_frame_that_comes_byte_by_byte(wire: Wire) -> None:
    for byte in wire.recorded([b"slow", b"ly"]):
        assert wire.sink.frames == []
        wire.feed(bytes([byte]))
    assert wire.sink.frames == [([b"slow", b"ly"], 0, 0)]


def test_several_frames_at_once(wire: Wire) -> None:
    wire.feed(wire.recorded([b"1"]) + wire.recorded([b"2"]) + wire.recorded([b"3"])[:-1])
    assert [parts for parts, *_ in wire.sink.frames] == [[b"1"], [b"2"]]


@pytest.mark.parametrize("place", [4, 10, -1])
def test_a_flipped_bit_is_noticed(wire: Wire, place: int) -> None:
    message = wire.recorded([b"frame"])
    message[place] ^= 1
    with pytest.raises(FrameError, match="did not encrypt"):
        wire.feed(message)
    assert wire.sink.frames == []


def test_a_replayed_frame_is_noticed(wire: Wire) -> None:
    message = wire.recorded([b"frame"])
    wire.feed(message)
    with pytest.raises(FrameError, match="did not encrypt"):
        wire.feed(message)
    assert len(wire.sink.frames) == 1


def test_a_frame_that_was_left_out_is_noticed(wire: Wire) -> None:
    wire.recorded([b"lost"])
    with pytest.raises(FrameError, match="did not encrypt"):
        wire.feed(wire.recorded([b"frame"]))


def test_a_length_that_was_cut_is_noticed(wire: Wire) -> None:
    message = wire.recorded([b"frame"])
    message[3] -= 1
    with pytest.raises(FrameError, match="did not encrypt"):
        wire.feed(message)


def test_a_length_that_cannot_be_is_noticed(wire: Wire) -> None:
    with pytest.raises(FrameError, match="3 bytes"):
        wire.feed(b"\0\0\0\3abc")


def test_a_length_that_is_too_great_is_noticed_before_as_much_has_come(wire: Wire) -> None:
    with pytest.raises(FrameError, match="131089 bytes"):
        wire.feed((128 * 1024 + TAG_BYTES + 1).to_bytes(4, "big") + b"x")


@pytest.mark.parametrize(
    "plaintext",
    [
        b"",
        b"\1 no note",
        b"\2",
        b"\7" + bytes(23),
        struct.pack("<B3xIQQ", 2, 1_000_000, 0, 0),  # more parts than there are lengths
        struct.pack("<B3xIQQQ", 2, 1, 0, 0, 50),  # a part that is not there
        struct.pack("<B3xIQQQ", 3, 1, 0, 0, 1 << 60),  # a frame larger than any
        struct.pack("<B3xIQQQ", 3, 1, 0, 0, 0),  # nothing in chunks
    ],
)
def test_nonsense_of_the_other_end_is_no_frame(wire: Wire, plaintext: bytes) -> None:
    message = CipherState(KEY).encrypt(plaintext)
    with pytest.raises(FrameError):
        wire.feed(len(message).to_bytes(4, "big") + message)


def test_a_note_in_the_middle_of_a_large_frame_is_none_of_its_chunks(wire: Wire) -> None:
    cipher = CipherState(KEY)
    for plaintext in (struct.pack("<B3xIQQQ", 3, 1, 0, 0, 100_000), encode_note(Alive())):
        message = cipher.encrypt(plaintext)
        wire.input.sendall(len(message).to_bytes(4, "big") + message)
    with pytest.raises(FrameError, match="chunk"):
        wire.reader.read()


def test_more_parts_than_a_head_can_tell_are_refused_before_anything_is_sent(wire: Wire) -> None:
    with pytest.raises(FrameError, match="20000 parts"):
        wire.writer.send_frame([b"x"] * 20_000)
    wire.feed(wire.recorded([b"next"]))
    assert [parts for parts, *_ in wire.sink.frames] == [[b"next"]]


def test_frames_of_several_threads_are_not_mixed(ends: tuple[WireWriter, WireReader, Sink]) -> None:
    writer, reader, sink = ends
    frames = [[bytes([number]) * 300_000] for number in range(4)]
    senders = [threading.Thread(target=writer.send_frame, args=(parts,)) for parts in frames]
    for sender in senders:
        sender.start()
    while len(sink.frames) < len(frames):
        assert reader.read() > 0
    for sender in senders:
        sender.join()
    assert sorted(parts for parts, *_ in sink.frames) == frames


def test_the_end_of_the_stream(ends: tuple[WireWriter, WireReader, Sink]) -> None:
    writer, reader, sink = ends
    writer.send_frame([b"last"])
    writer._connection.close()
    assert reader.read() > 0
    assert reader.read() == 0
    assert [parts for parts, *_ in sink.frames] == [[b"last"]]
