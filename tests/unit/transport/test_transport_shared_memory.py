from __future__ import annotations

import errno
import os
from mmap import PAGESIZE

import msgspec
import pytest

from phalanx.errors import FrameError, PeerDiedError
from phalanx.transport.shared_memory import SegmentHandle, SegmentHold, SharedSegment, resident_bytes_of


def test_what_one_mapping_writes_the_other_reads() -> None:
    with SharedSegment.create(1000, "test") as ours, SharedSegment.attach(ours.handle) as theirs:
        assert len(ours.buf) == len(theirs.buf) == 1000
        ours.buf[999] = 7
        assert theirs.buf[999] == 7


def test_a_handle_travels_as_a_message() -> None:
    with SharedSegment.create(64, "test") as segment:
        encoded = msgspec.msgpack.encode(segment.handle)
        assert msgspec.msgpack.decode(encoded, type=SegmentHandle) == segment.handle


def test_a_closed_segment_is_not_attached() -> None:
    segment = SharedSegment.create(64, "gone")
    segment.close()
    segment.close()
    with pytest.raises(FrameError, match="'gone'"):
        SharedSegment.attach(segment.handle)


def test_another_segment_at_the_same_descriptor_is_not_taken_for_it() -> None:
    with SharedSegment.create(64, "first") as first, SharedSegment.create(64, "second") as second:
        forged = msgspec.structs.replace(first.handle, fd=second.handle.fd)
        with pytest.raises(FrameError, match="pid is in use again"):
            SharedSegment.attach(forged)


def test_a_descriptor_that_is_no_segment_is_not_opened() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(FrameError):
            SharedSegment.attach(SegmentHandle(os.getpid(), reading, 64, 1))
    finally:
        os.close(reading)
        os.close(writing)


def test_the_owner_of_a_segment_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    handle = SegmentHandle(pid, 3, 64, 1, "kv cache")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    with pytest.raises(PeerDiedError, match="kv cache"):
        SharedSegment.attach(handle)
    os.waitpid(pid, 0)
    with pytest.raises(PeerDiedError, match="kv cache"):
        SharedSegment.attach(handle)


def test_a_segment_that_may_not_be_opened_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_descriptors(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with SharedSegment.create(64, "kv cache") as segment:
        monkeypatch.setattr(os, "open", out_of_descriptors)
        with pytest.raises(FrameError, match=r"'kv cache' .*Too many open files"):
            SharedSegment.attach(segment.handle)


def test_a_view_outlives_the_segment() -> None:
    segment = SharedSegment.create(64, "test")
    view = segment.buf[:1]
    segment.close()
    view[0] = 1
    assert view[0] == 1


def test_it_cannot_be_shortened_under_its_readers() -> None:
    with SharedSegment.create(64, "test") as segment, pytest.raises(PermissionError):
        os.ftruncate(segment.handle.fd, 0)


def test_what_is_held_outlives_its_maker() -> None:
    segment = SharedSegment.create(64, "test")
    segment.buf[3] = 7
    with SegmentHold(segment.handle) as hold:
        segment.close()
        with pytest.raises(FrameError):
            SegmentHold(segment.handle)
        with SharedSegment.attach(hold.handle) as again, SegmentHold(hold.handle) as second:
            assert again.buf[3] == 7
            assert (second.handle.nonce, second.handle.size_bytes) == (segment.handle.nonce, 64)
    hold.close()
    with pytest.raises(FrameError):
        SharedSegment.attach(hold.handle)


def test_whole_pages_are_given_back_to_the_system() -> None:
    page = os.sysconf("SC_PAGESIZE")
    with SharedSegment.create(4 * page, "test") as ours, SharedSegment.attach(ours.handle) as theirs:
        ours.buf[:] = b"\1" * (4 * page)
        ours.release(100, 3 * page + 100)
        assert bytes(theirs.buf) == b"\1" * page + bytes(2 * page) + b"\1" * page
        ours.release(100, 200)
        assert theirs.buf[100] == 1


def test_who_detaches_has_memory_of_its_own_where_it_was() -> None:
    with SharedSegment.create(3 * PAGESIZE, "test") as ours, SharedSegment.attach(ours.handle) as theirs:
        ours.buf[:] = b"1" * len(ours.buf)
        view, before = ours.buf[PAGESIZE:], ours.handle
        num_descriptors = len(os.listdir("/proc/self/fd"))
        ours.detach([(5, 7), (PAGESIZE, PAGESIZE + 1)])
        assert bytes(ours.buf).replace(bytes(1), b"") == b"111" and bytes(ours.buf[5:7]) == b"11" and view[0] == 49
        view[1] = 7
        assert bytes(theirs.buf) == b"1" * len(ours.buf), "others keep what there was"
        assert ours.handle.nonce != before.nonce and len(os.listdir("/proc/self/fd")) == num_descriptors
        with pytest.raises(FrameError), SharedSegment.attach(before):
            pass
        with SharedSegment.attach(ours.handle) as new:
            assert new.buf[PAGESIZE + 1] == 7
        theirs.detach()
        assert not any(theirs.buf)


def test_a_mapping_keeps_no_descriptor() -> None:
    """Memory that a process has detached from is the system's again when others have let go of it."""
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with SharedSegment.create(64, "test") as ours, SharedSegment.attach(ours.handle):
        assert len(os.listdir("/proc/self/fd")) == num_descriptors + 1


def test_what_a_segment_takes() -> None:
    with SharedSegment.create(8 * PAGESIZE, "test") as segment:
        before = resident_bytes_of(segment.handle)
        segment.buf[PAGESIZE : 3 * PAGESIZE] = b"1" * (2 * PAGESIZE)
        assert resident_bytes_of(segment.handle) - before == 2 * PAGESIZE
    assert resident_bytes_of(segment.handle) == 0
