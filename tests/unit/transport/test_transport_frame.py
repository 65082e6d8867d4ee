from __future__ import annotations

import array
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import FrameError
from phalanx.transport.frame import align, as_part, read_frame, write_frame
from phalanx.transport.shared_memory import SegmentHandle

SLOT_BYTES = 512
HANDLE = SegmentHandle(os.getpid(), 7, 1000, 2**63, "test")


@given(st.lists(st.binary(max_size=600), min_size=1, max_size=6))
def test_what_is_written_is_read(parts: list[bytes]) -> None:
    slot, spilled = memoryview(bytearray(SLOT_BYTES)), memoryview(bytearray(10_000))

    def segment_of(size_bytes: int) -> tuple[SegmentHandle, memoryview]:
        return HANDLE, spilled[:size_bytes]

    def memory_of(fd: int, size_bytes: int, nonce: int) -> memoryview:
        assert (fd, size_bytes, nonce) == (HANDLE.fd, HANDLE.size_bytes, HANDLE.nonce)
        return spilled

    write_frame(slot, parts, segment_of)
    assert [bytes(part) for part in read_frame(slot, memory_of)] == parts


@pytest.mark.parametrize(("size_bytes", "is_spilled"), [(SLOT_BYTES - 64, False), (SLOT_BYTES - 63, True)])
def test_a_slot_is_used_to_its_last_byte(size_bytes: int, is_spilled: bool) -> None:
    sizes = []

    def segment_of(size_bytes: int) -> tuple[SegmentHandle, memoryview]:
        sizes.append(size_bytes)
        return HANDLE, memoryview(bytearray(size_bytes))

    write_frame(memoryview(bytearray(SLOT_BYTES)), [bytes(size_bytes)], segment_of)
    assert bool(sizes) == is_spilled


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 70), min_size=8, max_size=8))
def test_bytes_that_are_no_frame_are_refused(words: list[int]) -> None:
    slot = memoryview(bytearray(struct.pack("<8Q", *words) + bytes(64)))
    try:
        parts = read_frame(slot, lambda *_: memoryview(bytearray(64)))
    except FrameError:
        return
    assert all(len(part) <= 64 for part in parts)


def test_more_parts_than_fit() -> None:
    slot = memoryview(bytearray(struct.pack("<8Q", 0, 1000, 0, 0, 0, 0, 0, 0)))
    with pytest.raises(FrameError, match="1000 parts"):
        read_frame(slot, lambda *_: slot)


def test_parts_start_at_cache_lines() -> None:
    assert [align(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


def test_a_column_of_integers_is_a_part() -> None:
    assert bytes(as_part(array.array("i", [1, 2]))) == struct.pack("<2i", 1, 2)
    assert len(as_part(array.array("i"))) == 0


def test_a_strided_buffer_is_refused() -> None:
    with pytest.raises(TypeError):
        as_part(memoryview(b"abcd")[::2])
