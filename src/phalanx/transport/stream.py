"""Frames over a connected pair of Unix sockets: the server's process and the brain's.

A frame is its length, u32 little-endian, and then its bytes. The server's end is for asyncio; the brain's end never
blocks to receive. A brain that sleeps on a queue's bell is woken by the stream too:

    queue.get(timeout_s=…, until=stream.is_readable)     with     Stream(…, bell=queue.bell)

The process's Poller thread sleeps in epoll, and on an arrival rings the bell; the brain then reads the socket itself.
So nothing is buffered without bound, idle streams take no CPU, and a submission costs two thread wake-ups.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Self

from phalanx.errors import DeadlineError, FrameError
from phalanx.transport.futex import Doorbell
from phalanx.transport.liveness import Party
from phalanx.transport.readiness import Poller

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
# Enough to amortise the calls; after it, who polls gets a turn at its other work.
_BYTES_PER_POLL = 4 * 1024 * 1024


def stream_pair() -> tuple[int, int]:
    """Two connected descriptors, one for each process; an exec closes those that are not passed on to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return ours.detach(), theirs.detach()


class Stream:
    """The end for a loop of one's own. For one thread."""

    def __init__(
        self, fd: int, peer: Party, *, bell: Doorbell | None = None, max_frame_bytes: int = _MAX_FRAME_BYTES
    ) -> None:
        """Takes over `fd`, a connected stream socket. `bell` is rung whenever something arrives or the peer is gone."""
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._peer = peer
        self._bell = bell
        self._max_frame_bytes = max_frame_bytes
        self._received = bytearray()
        self._is_at_end = False
        if bell is not None:
            Poller.of_process().add(fd, bell.ring)

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_readable(self) -> bool:
        """Whether `poll` would find bytes, or the end. Does not block."""
        return bool(self._is_ready(select.POLLIN, 0.0))

    def wait(self, timeout_s: float) -> bool:
        """Block until `is_readable`, at most `timeout_s` seconds."""
        return self._is_ready(select.POLLIN, timeout_s)

    def poll(self) -> list[bytes]:
        """The frames that are there, in order; does not block. After a call that found some there may be more.

        Raises FrameError on a length beyond the limit; PeerDiedError at the end, after all whole frames were given.
        """
        frames: list[bytes] = []
        num_read = 0
        while not self._is_at_end and not (frames and num_read >= _BYTES_PER_POLL):
            try:
                chunk = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                chunk = b""
            self._is_at_end = not chunk
            num_read += len(chunk)
            self._received += chunk
            frames += self._take_frames()
        if self._is_at_end and not frames:
            raise self._peer.died("its end of the stream is closed")
        return frames

    def send(self, frame: bytes, *, deadline_s: float) -> None:
        """Block until the kernel took the frame. Raises PeerDiedError; DeadlineError if the peer does not read.

        After a DeadlineError a part may be sent: the stream is of no more use.
        """
        _check_length(len(frame), self._max_frame_bytes)
        started = time.monotonic()
        left = memoryview(_LENGTH.pack(len(frame)) + frame)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                waited_s = time.monotonic() - started
                if not self._is_ready(select.POLLOUT, deadline_s - waited_s):
                    raise DeadlineError("space in the stream", str(self._peer), time.monotonic() - started) from None
            except ConnectionError as error:
                raise self._peer.died("its end of the stream is closed") from error

    def close(self) -> None:
        """May be called more than once."""
        if self._socket.fileno() < 0:
            return
        if self._bell is not None:
            Poller.of_process().remove(self._socket.fileno())
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_frames(self) -> list[bytes]:
        received, frames, start = self._received, [], 0
        while len(received) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received, start)
            _check_length(length, self._max_frame_bytes)
            end = start + _LENGTH.size + length
            if end > len(received):
                break
            frames.append(bytes(received[start + _LENGTH.size : end]))
            start = end
        del received[:start]
        return frames

    def _is_ready(self, event: int, timeout_s: float) -> bool:
        poller = select.poll()
        poller.register(self._socket, event)
        return bool(poller.poll(max(timeout_s, 0) * 1000))


class AsyncStream:
    """The end for asyncio: `await send(frame)`, `async for frame in stream`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Party, max_frame_bytes: int
    ) -> None:
        """Use `open`."""
        self._reader = reader
        self._writer = writer
        self._peer = peer
        self._max_frame_bytes = max_frame_bytes
        self._is_closed = False

    @classmethod
    async def open(cls, fd: int, peer: Party, *, max_frame_bytes: int = _MAX_FRAME_BYTES) -> Self:
        """Takes over `fd`, a connected stream socket, for the running event loop."""
        reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd))
        return cls(reader, writer, peer, max_frame_bytes)

    async def send(self, frame: bytes) -> None:
        """Hand the frame over, in the order of the calls; waits while the peer reads more slowly than we send.

        Has no deadline of its own: use asyncio.timeout. Raises PeerDiedError.
        """
        _check_length(len(frame), self._max_frame_bytes)
        try:
            self._writer.write(_LENGTH.pack(len(frame)) + frame)
            await self._writer.drain()
        except ConnectionError as error:
            raise self._peer.died("its end of the stream is closed") from error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Frames until `close`. Raises PeerDiedError when the peer's end is closed, FrameError on too long a frame."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                _check_length(length, self._max_frame_bytes)
                yield await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                if self._is_closed:
                    return
                raise self._peer.died("its end of the stream is closed") from error

    async def close(self, *, deadline_s: float = 1.0) -> None:
        """Ends an `async for` over this stream too. May be called more than once.

        What the peer has not read after `deadline_s` seconds is thrown away.
        """
        self._is_closed = True
        self._writer.close()
        closed = asyncio.ensure_future(self._writer.wait_closed())
        done, _ = await asyncio.wait([closed], timeout=deadline_s)
        if not done:
            self._writer.transport.abort()
        with suppress(ConnectionError):  # the peer closed first, which is no news to who closes
            await closed


def _check_length(length: int, max_frame_bytes: int) -> None:
    if length > max_frame_bytes:
        raise FrameError(f"a frame of {length} bytes; the limit is {max_frame_bytes}")
