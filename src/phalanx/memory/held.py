"""What is costly to make again, described so that other processes can take it over. Knows no torch.

From a worker to the brain as the answer to AllocateCache, and in the WorkerSpec to the worker that comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from phalanx.transport.descriptors import DescriptorHandle
from phalanx.transport.shared_memory import SegmentHandle


class Region(NamedTuple):
    """Where a tensor lies: segment number, offset and size in bytes. On a GPU it may go on in the segments after it."""

    segment: int
    offset_bytes: int
    size_bytes: int


class PieceHandle(msgspec.Struct, frozen=True):
    """A piece of a GPU's memory: a segment there."""

    descriptor: DescriptorHandle
    size_bytes: int
    nonce: int
    """The piece's own, whoever holds it."""


class HeldMemory(msgspec.Struct, frozen=True):
    """One rank's tensors on one host: of the memory of a worker, or of a Holder that keeps it.

    They are of use only to a worker of the same rank, with the same configuration, checkpoint and GPU.
    """

    segments: tuple[SegmentHandle, ...]
    """On a CPU."""
    regions: dict[str, Region]
    """By the tensors' names, in the segments or pieces of these numbers."""
    pieces: tuple[PieceHandle, ...] = ()
    """On a GPU, where they lie one after the other."""
    cache: frozenset[str] = frozenset()
    """Names of the tensors that are the KV cache's; the others are the weights'."""

    def part(self, is_kept: Callable[[str], bool]) -> HeldMemory:
        """On a CPU, tensors with these names, and the segments that they lie in."""
        assert not self.pieces
        regions = {name: region for name, region in self.regions.items() if is_kept(name)}
        used = sorted({region.segment for region in regions.values() if region.size_bytes})
        number = {segment: i for i, segment in enumerate(used)}
        return HeldMemory(
            segments=tuple(self.segments[segment] for segment in used),
            regions={name: region._replace(segment=number.get(region.segment, 0)) for name, region in regions.items()},
            cache=self.cache & regions.keys(),
        )


def encode_held(memory: HeldMemory) -> bytes:
    """As msgpack, for a message."""
    return msgspec.msgpack.encode(memory)


def decode_held(message: bytes) -> HeldMemory:
    """What `encode_held` has made."""
    return msgspec.msgpack.decode(message, type=HeldMemory)
