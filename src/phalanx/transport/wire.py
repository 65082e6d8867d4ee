"""Frames over an authenticated, encrypted stream.

The stream is a sequence of Noise transport messages, each after its length (u32, big-endian), and longer than Noise has
them: of up to 128 KiB. A plaintext is one of

    a note      u8 1, then a message of link_messages
    frames      each the head below and then its parts; those that are smaller than _INLINE_BYTES
    a head      of a larger frame; its parts follow in chunks
    a chunk     of the parts of the frame whose head went before

Chunks are encrypted, sent and decrypted a few at a time, so that these overlap in a large frame; a chunk is a part's or
a piece of one, so that it can be decrypted where the part belongs.
"""

from __future__ import annotations

import functools
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from phalanx.errors import FrameError
from phalanx.transport.frame import Part
from phalanx.transport.link_messages import Note
from phalanx.transport.noise import TAG_BYTES, CipherState

_LENGTH = struct.Struct(">I")
_CHUNK_BYTES = _MAX_PLAINTEXT_BYTES = 128 * 1024
_MAX_MESSAGE_BYTES = _MAX_PLAINTEXT_BYTES + TAG_BYTES
_INLINE_BYTES = 16 * 1024
_BATCH = 4
"""Messages of a large frame that go to the kernel in one call. To four ranks on another host, a frame of 1 MB took 1.3
times as long with 128 KiB at a time, and 1.5 times with 64. All of it at once would not overlap."""
_BUFFER_BYTES = _BATCH * (_LENGTH.size + _MAX_MESSAGE_BYTES)
_MAX_FRAME_BYTES = 1 << 36
_NOTE_BYTE = b"\1"
_INLINE, _CHUNKED = 2, 3
# Kind, number of parts, rank (of a reply), number of commands that the sender's node is done with (of a reply).
_HEAD = struct.Struct("<B3xIQQ")
# A head and the length of a frame's only part. Most frames are such, so the functions below take a short way with them.
_HEAD_OF_ONE = struct.Struct("<B3xIQQQ")

_note_encoder = msgspec.msgpack.Encoder()
_note_decoder: msgspec.msgpack.Decoder[Note] = msgspec.msgpack.Decoder(Note)


@functools.cache
def _lengths(num_parts: int) -> struct.Struct:
    return struct.Struct(f"<{num_parts}Q")


def encode_note(note: Note) -> bytes:
    """The plaintext that carries it."""
    return _NOTE_BYTE + _note_encoder.encode(note)


def decode_note(plaintext: bytes) -> Note:
    """Raises FrameError if it is none."""
    try:
        return _note_decoder.decode(plaintext[1:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(f"a note between nodes that is none of ours: {error}") from error


class WireWriter:
    """The sending end. Any thread may send; what one call sends stays together."""

    def __init__(self, connection: socket.socket, cipher: CipherState) -> None:
        """`connection`: connected. If it does not block, every call needs `wait`.

        `wait` blocks until the socket takes more; what it raises leaves the stream of no more use.
        """
        self._connection = connection
        self._cipher = cipher
        self._out = memoryview(bytearray(_BUFFER_BYTES))
        self._filled = 0
        self._small: list[Part] = []
        self._small_bytes = 0
        self._lock = threading.Lock()

    def send_note(self, note: Note, wait: Callable[[], None] | None = None) -> None:
        """Raises OSError when the connection is gone."""
        with self._lock:
            self._encrypt_small()
            self._encrypt(encode_note(note))
            self._flush(wait)

    def try_note(self, note: Note, wait: Callable[[], None] | None = None) -> None:
        """Send it unless another thread is sending, which is as good a sign of life."""
        if self._lock.acquire(blocking=False):
            try:
                self._encrypt_small()
                self._encrypt(encode_note(note))
                self._flush(wait)
            finally:
                self._lock.release()

    def send_frame(
        self,
        parts: Sequence[Part],
        wait: Callable[[], None] | None = None,
        *,
        rank: int = 0,
        num_passed: int = 0,
        more: bool = False,
    ) -> None:
        """`more` says that another frame, note or `flush` follows at once: small frames then go together.

        Raises FrameError, before anything is sent, for more parts than a head can tell; OSError.
        """
        num_parts = len(parts)
        if num_parts == 1 and len(parts[0]) <= _INLINE_BYTES - _HEAD_OF_ONE.size:
            self._send_one(parts[0], wait, rank, num_passed, more)
            return
        lengths = [len(part) for part in parts]
        num_bytes = _HEAD.size + 8 * num_parts + sum(lengths)
        if _HEAD.size + 8 * num_parts > _MAX_PLAINTEXT_BYTES:
            raise FrameError(f"a frame of {num_parts} parts: their lengths do not fit into one message")
        with self._lock:
            if num_bytes <= _INLINE_BYTES:
                head = _HEAD.pack(_INLINE, num_parts, rank, num_passed)
                # A copy, as the parts are the sender's again after the call.
                self._add_small(b"".join((head, _lengths(num_parts).pack(*lengths), *parts)), wait)
                if not more:
                    self._encrypt_small()
                    self._flush(wait)
                return
            self._encrypt_small()
            self._flush(wait)
            head = _HEAD.pack(_CHUNKED, num_parts, rank, num_passed)
            self._encrypt(head + _lengths(num_parts).pack(*lengths))
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), _CHUNK_BYTES):
                    self._encrypt(view[start : start + _CHUNK_BYTES])
                    if self._filled > _BUFFER_BYTES - (_LENGTH.size + _MAX_MESSAGE_BYTES):
                        self._flush(wait)
            self._flush(wait)

    def flush(self, wait: Callable[[], None] | None = None) -> None:
        """Send what is left of calls with `more`."""
        with self._lock:
            self._encrypt_small()
            self._flush(wait)

    def _send_one(self, part: Part, wait: Callable[[], None] | None, rank: int, num_passed: int, more: bool) -> None:
        frame = _HEAD_OF_ONE.pack(_INLINE, 1, rank, num_passed, len(part)) + part
        with self._lock:
            if more or self._small:
                self._add_small(frame, wait)
            if not more:
                self._encrypt_small() if self._small else self._encrypt(frame)
                self._flush(wait)

    def _add_small(self, frame: bytes, wait: Callable[[], None] | None) -> None:
        """A frame that goes together with others, or alone."""
        if self._small_bytes + len(frame) > _MAX_PLAINTEXT_BYTES:
            self._encrypt_small()
            self._flush(wait)
        self._small.append(frame)
        self._small_bytes += len(frame)

    def _encrypt_small(self) -> None:
        if self._small:
            self._encrypt(b"".join(self._small))
            self._small.clear()
            self._small_bytes = 0

    def _encrypt(self, plaintext: bytes | memoryview) -> None:
        """Append a message to what is to be sent, for which there is space."""
        length = len(plaintext) + TAG_BYTES
        start = self._filled + _LENGTH.size
        _LENGTH.pack_into(self._out, self._filled, length)
        self._cipher.encrypt_into(plaintext, self._out[start : start + length])
        self._filled = start + length

    def _flush(self, wait: Callable[[], None] | None) -> None:
        left = self._out[: self._filled]
        self._filled = 0
        while left:
            try:
                left = left[self._connection.send(left) :]
            except BlockingIOError:
                assert wait is not None
                wait()


class FrameSink(Protocol):
    """What a WireReader gives frames and notes to."""

    def take_frame(self, parts: list[memoryview], rank: int, num_passed: int) -> None:
        """A whole frame. The memory stays valid."""

    def make_room(self, lengths: Sequence[int]) -> list[memoryview]:
        """Memory for the parts of a frame that is on its way."""

    def take_filled(self, rank: int, num_passed: int) -> None:
        """That frame has arrived."""

    def take_note(self, note: Note) -> None:
        """Something else."""


class WireReader:
    """The receiving end. For one thread."""

    def __init__(self, connection: socket.socket, cipher: CipherState, sink: FrameSink) -> None:
        self._connection = connection
        self._cipher = cipher
        self._sink = sink
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._missing: deque[memoryview] = deque()
        self._origin = (0, 0)
        self.num_messages = 0
        """Whole ones that came from the other end: its signs of life."""

    def read(self) -> int:
        """Receive once, and give what is complete to the sink. Returns the number of bytes, 0 at the stream's end.

        Raises what the socket raises; FrameError for bytes that the other end did not send, and what the sink raises:
        the stream is of no more use then.
        """
        num_bytes = self._connection.recv_into(self._buffer[self._end :])
        self._end += num_bytes
        buffer, start, end = self._buffer, self._start, self._end
        while end - start > _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > _MAX_MESSAGE_BYTES:
                raise FrameError(f"a message of {length} bytes between nodes")
            message_at = start + _LENGTH.size
            message_end = message_at + length
            if message_end > end:
                break
            self._take(buffer[message_at:message_end])
            self.num_messages += 1
            start = message_end
        self._start = start
        self._make_space()
        return num_bytes

    def _make_space(self) -> None:
        """For at least one whole message."""
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._start < _LENGTH.size + _MAX_MESSAGE_BYTES:
            num_left = self._end - self._start
            self._buffer[:num_left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, num_left

    def _take(self, message: memoryview) -> None:
        if self._missing:
            self._take_chunk(message)
            return
        if len(message) < TAG_BYTES:
            raise FrameError(f"a message of {len(message)} bytes between nodes")
        plaintext = self._cipher.decrypt(message)
        if plaintext.startswith(_NOTE_BYTE):
            self._sink.take_note(decode_note(plaintext))
        else:
            self._take_frames(plaintext)

    def _take_frames(self, plaintext: bytes) -> None:
        """Whole frames, or the head of a large one."""
        if not plaintext:
            raise FrameError("an empty message between nodes")
        view, start, size = memoryview(plaintext), 0, len(plaintext)
        while start < size:
            if start + _HEAD_OF_ONE.size <= size:
                kind, num_parts, rank, num_passed, length = _HEAD_OF_ONE.unpack_from(plaintext, start)
                end = start + _HEAD_OF_ONE.size + length
                if kind == _INLINE and num_parts == 1 and end <= size:
                    self._sink.take_frame([view[end - length : end]], rank, num_passed)
                    start = end
                    continue
            try:
                kind, num_parts, rank, num_passed = _HEAD.unpack_from(plaintext, start)
                start += _HEAD.size
                if num_parts > size:  # before a format of as many is made
                    raise FrameError(f"a frame of {num_parts} parts in a message of {len(plaintext)} bytes")
                lengths = _lengths(num_parts).unpack_from(plaintext, start)
            except struct.error as error:
                raise FrameError(f"a frame between nodes that is none: {error}") from error
            start += 8 * num_parts
            num_bytes = sum(lengths)
            if kind == _INLINE and start + num_bytes <= size:
                parts = []
                for length in lengths:
                    parts.append(view[start : start + length])
                    start += length
                self._sink.take_frame(parts, rank, num_passed)
            elif kind == _CHUNKED and start == size and 0 < num_bytes <= _MAX_FRAME_BYTES:
                self._origin = (rank, num_passed)
                for part in self._sink.make_room(lengths):
                    self._missing += (part[at : at + _CHUNK_BYTES] for at in range(0, len(part), _CHUNK_BYTES))
            else:
                raise FrameError(f"a frame between nodes that is none: kind {kind}, {num_bytes} bytes")

    def _take_chunk(self, message: memoryview) -> None:
        chunk = self._missing[0]
        if len(message) != len(chunk) + TAG_BYTES:
            raise FrameError(f"a chunk of {len(message)} bytes instead of {len(chunk) + TAG_BYTES}")
        self._cipher.decrypt_into(message, chunk)
        self._missing.popleft()
        if not self._missing:
            self._sink.take_filled(*self._origin)
