from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.futex import Doorbell
from phalanx.transport.liveness import Party
from phalanx.transport.stream import AsyncStream, Stream, stream_pair

PEER = Party.me("server")


@pytest.fixture
def pair() -> Iterator[tuple[Stream, Stream]]:
    left, right = stream_pair()
    with Stream(left, PEER) as ours, Stream(right, PEER) as theirs:
        yield ours, theirs


def _polled(stream: Stream, num_frames: int) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < num_frames:
        assert stream.wait(timeout_s=10)
        frames += stream.poll()
    return frames


def test_frames_arrive_whole_and_in_order(pair: tuple[Stream, Stream]) -> None:
    ours, theirs = pair
    sent = [b"one", b"", b"x" * 100_000, b"four"]
    sender = threading.Thread(target=lambda: [ours.send(frame, deadline_s=10) for frame in sent])
    sender.start()
    assert _polled(theirs, 4) == sent
    sender.join(10)
    assert theirs.poll() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=300), max_size=10), st.data())
def test_it_does_not_matter_how_bytes_are_cut(frames: list[bytes], data: st.DataObject) -> None:
    left, right = stream_pair()
    wire = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
    got: list[bytes] = []
    with Stream(left, PEER) as stream, socket.socket(fileno=right) as raw:
        while wire:
            cut = data.draw(st.integers(1, len(wire)))
            raw.sendall(wire[:cut])
            wire = wire[cut:]
            got += stream.poll()
    assert got == frames


def test_the_end_comes_after_the_last_frame_and_names_the_peer(pair: tuple[Stream, Stream]) -> None:
    ours, theirs = pair
    ours.send(b"last", deadline_s=1)
    ours.close()
    ours.close()
    assert theirs.poll() == [b"last"]
    with pytest.raises(PeerDiedError, match="server"):
        theirs.poll()
    with pytest.raises(PeerDiedError, match="server"):
        theirs.send(b"x", deadline_s=1)


def test_a_peer_that_does_not_read_is_named(pair: tuple[Stream, Stream]) -> None:
    with pytest.raises(DeadlineError, match="server"):
        pair[0].send(b"x" * 10_000_000, deadline_s=0.05)


def test_a_length_beyond_the_limit_is_refused() -> None:
    left, right = stream_pair()
    with Stream(left, PEER, max_frame_bytes=10) as stream, socket.socket(fileno=right) as raw:
        with pytest.raises(FrameError, match="the limit is 10"):
            stream.send(b"x" * 11, deadline_s=1)
        raw.sendall(struct.pack("<I", 11))
        with pytest.raises(FrameError, match="the limit is 10"):
            stream.poll()


def test_an_arrival_rings_the_bell() -> None:
    left, right = stream_pair()
    bell = Doorbell(memoryview(bytearray(4)))
    with Stream(left, PEER, bell=bell) as stream, Stream(right, PEER) as other:
        for n in range(3):
            seen = bell.value()
            assert not stream.is_readable()
            other.send(bytes([n]), deadline_s=1)
            assert bell.wait(seen, timeout_s=10)
            assert stream.is_readable()
            assert stream.poll() == [bytes([n])]
        seen = bell.value()
        other.close()
        assert bell.wait(seen, timeout_s=10)


def test_idle_it_takes_no_cpu() -> None:
    left, right = stream_pair()
    bell = Doorbell(memoryview(bytearray(4)))
    with Stream(left, PEER, bell=bell), Stream(right, PEER):
        before = time.process_time()
        assert not bell.wait(bell.value(), timeout_s=0.5)
        assert time.process_time() - before < 0.01


def test_asyncio_and_blocking_ends_talk() -> None:
    left, right = stream_pair()

    async def serve() -> list[bytes]:
        stream = await AsyncStream.open(left, PEER)
        await stream.send(b"hello")
        got = []
        async for frame in stream:
            got.append(frame)
            if len(got) == 3:
                break
        await stream.close()
        return got

    def echo() -> None:
        with Stream(right, PEER) as stream:
            for frame in (*_polled(stream, 1), b"", b"x" * 1_000_000):
                stream.send(frame, deadline_s=10)

    echoing = threading.Thread(target=echo)
    echoing.start()
    assert asyncio.run(asyncio.wait_for(serve(), 10)) == [b"hello", b"", b"x" * 1_000_000]
    echoing.join(10)


def test_the_end_of_an_asyncio_stream_names_the_peer() -> None:
    left, right = stream_pair()

    async def serve() -> None:
        stream = await AsyncStream.open(left, PEER)
        Stream(right, PEER).close()
        try:
            async for _ in stream:
                pass
        finally:
            await stream.close()

    with pytest.raises(PeerDiedError, match="server"):
        asyncio.run(asyncio.wait_for(serve(), 10))


def test_asyncio_waits_for_a_slow_reader() -> None:
    left, right = stream_pair()

    async def serve() -> None:
        stream = await AsyncStream.open(left, PEER)
        try:
            async with asyncio.timeout(0.1):
                while True:
                    await stream.send(b"x" * 100_000)
        finally:
            await stream.close(deadline_s=0.1)

    with Stream(right, PEER), pytest.raises(TimeoutError):
        asyncio.run(serve())


def test_closing_ends_an_iteration() -> None:
    left, right = stream_pair()

    async def serve() -> None:
        stream = await AsyncStream.open(left, PEER, max_frame_bytes=10)

        async def iterate() -> None:
            async for _ in stream:
                pass

        iteration = asyncio.create_task(iterate())
        await asyncio.sleep(0)
        await stream.close()
        await asyncio.wait_for(iteration, 10)

    with Stream(right, PEER):
        asyncio.run(serve())
