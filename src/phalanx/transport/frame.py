"""A frame is a list of byte buffers, "parts", in a slot of a ring.

A slot begins with its sequence number, which is the ring's business. The frame follows (all numbers u64):

    number of parts; of the segment that holds them if not this slot: descriptor + 1, size, nonce; length of each part
    the parts, each at a multiple of 64 bytes: after this header, or from the segment's start on
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from phalanx.errors import FrameError
from phalanx.transport.shared_memory import SegmentHandle

if TYPE_CHECKING:
    from typing_extensions import Buffer

Part: TypeAlias = bytes | bytearray | memoryview

_HEADER_AT = 8
_NUM_FIXED_WORDS = 4
# A message without buffers. It is most of the traffic, so the functions below take a short way with it.
_ONE_PART = struct.Struct("<5Q")
_ONE_PART_AT = 64


def align(num_bytes: int) -> int:
    """The next multiple of 64: a cache line, and more than any SIMD load of a tensor's data asks for."""
    return (num_bytes + 63) & -64


def as_part(buffer: Buffer) -> memoryview:
    """`buffer` as a flat view of bytes, without a copy. It must be C-contiguous (else TypeError)."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def write_frame(
    slot: memoryview, parts: Sequence[Part], segment_of: Callable[[int], tuple[SegmentHandle, memoryview]]
) -> None:
    """Copy the parts into `slot`; if they do not fit, into the segment that `segment_of(size_bytes)` provides.

    Raises FrameError if there are so many parts that not even their lengths fit.
    """
    if len(parts) == 1:
        part = parts[0]
        end = _ONE_PART_AT + len(part)
        if end <= len(slot):
            _ONE_PART.pack_into(slot, _HEADER_AT, 1, 0, 0, 0, len(part))
            slot[_ONE_PART_AT:end] = part
            return
    for memory, part in zip(lay_out(slot, tuple(map(len, parts)), segment_of), parts, strict=True):
        memory[:] = part


def lay_out(
    slot: memoryview, lengths: Sequence[int], segment_of: Callable[[int], tuple[SegmentHandle, memoryview]]
) -> list[memoryview]:
    """The memory of each part of a frame whose header this writes; for the rest as `write_frame`."""
    num_parts = len(lengths)
    parts_at = _parts_at(num_parts)
    if parts_at > len(slot):
        raise FrameError(f"a frame of {num_parts} parts: their lengths do not fit into {len(slot)} bytes")
    size_bytes = sum(map(align, lengths))
    where, memory, at = (0, 0, 0), slot, parts_at
    if parts_at + size_bytes > len(slot):
        handle, memory = segment_of(size_bytes)
        where, at = (handle.fd + 1, handle.size_bytes, handle.nonce), 0
    struct.pack_into(f"<{_NUM_FIXED_WORDS + num_parts}Q", slot, _HEADER_AT, num_parts, *where, *lengths)
    return _cut(memory, at, lengths)


def read_frame(slot: memoryview, memory_of: Callable[[int, int, int], memoryview]) -> list[memoryview]:
    """Views of the parts in `slot`, or in the segment that `memory_of(fd, size_bytes, nonce)` maps.

    Raises FrameError if this is no frame.
    """
    num_parts, fd_plus_1, size_bytes, nonce, length = _ONE_PART.unpack_from(slot, _HEADER_AT)
    if num_parts == 1 and not fd_plus_1:
        end = _ONE_PART_AT + length
        if end <= len(slot):
            return [slot[_ONE_PART_AT:end]]
    if _parts_at(num_parts) > len(slot):
        raise FrameError(f"a frame of {num_parts} parts in a slot of {len(slot)} bytes")
    lengths = struct.unpack_from(f"<{num_parts}Q", slot, _HEADER_AT + 8 * _NUM_FIXED_WORDS)
    if fd_plus_1:
        return _cut(memory_of(fd_plus_1 - 1, size_bytes, nonce), 0, lengths)
    return _cut(slot, _parts_at(num_parts), lengths)


def _parts_at(num_parts: int) -> int:
    return align(_HEADER_AT + 8 * (_NUM_FIXED_WORDS + num_parts))


def _cut(memory: memoryview, at: int, lengths: Sequence[int]) -> list[memoryview]:
    parts = []
    for length in lengths:
        end = at + length
        if end > len(memory):
            raise FrameError(f"a part of {length} bytes at {at}, beyond the end of {len(memory)} bytes")
        parts.append(memory[at:end])
        at = align(end)
    return parts
