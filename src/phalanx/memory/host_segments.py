"""A CPU's memory for an arena: anonymous shared memory, not the process's own heap, so that others can hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch

from phalanx.memory.held import HeldMemory, Region
from phalanx.transport.shared_memory import SharedSegment

SEGMENT_BYTES = 1 << 30
"""Tensors share segments of this size: whoever holds the memory of a host's ranks has a descriptor for each, and may
have a thousand. What is not written to takes no memory."""

ALIGNMENT = 64
"""One cache line, and what vector loads want."""


class HostSegments:
    """Segments as they are needed, after those that were there. Memory is taken only when it is first written."""

    def __init__(self, label: str, held: HeldMemory | None) -> None:
        """Raises PeerDiedError if whoever holds it is gone, FrameError if they have let go of it."""
        self._label = label
        self._segments: list[SharedSegment] = []
        self._shared: int | None = None
        """The segment that small tensors go into: one of those that are made here."""
        self._free_from = 0
        with ExitStack() as undo:
            undo.callback(self.close)
            for handle in held.segments if held is not None else ():
                self._segments.append(SharedSegment.attach(handle))
            undo.pop_all()

    def reserve(self, size_bytes: int) -> Region:
        """Room for a tensor. Raises OSError when there is none."""
        if size_bytes > SEGMENT_BYTES:
            return Region(self._add_segment(size_bytes), 0, size_bytes)
        if self._shared is None or self._free_from + size_bytes > SEGMENT_BYTES:
            self._shared, self._free_from = self._add_segment(SEGMENT_BYTES), 0
        region = Region(self._shared, self._free_from, size_bytes)
        self._free_from += -(-size_bytes // ALIGNMENT) * ALIGNMENT
        return region

    def tensor(self, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """What lies there, in one dimension. It is not empty."""
        return torch.frombuffer(self._segments[region.segment].buf[region.offset_bytes : _end(region)], dtype=dtype)

    def begin_part(self, size_bytes: int | None) -> None:
        """What comes now goes into other segments; its size does not matter."""
        self._shared = None

    def release(self, regions: Iterable[Region]) -> None:
        """Give their memory back to the system, in whole pages."""
        for run in _adjacent(regions):
            self._segments[run.segment].release(run.offset_bytes, _end(run))

    def restore(self, regions: Iterable[Region]) -> None:
        """Nothing to do: they take memory again as they are written."""

    def describe(self, regions: Mapping[str, Region]) -> HeldMemory:
        """These tensors, and the segments that they lie in."""
        handles = tuple(segment.handle for segment in self._segments)
        return HeldMemory(handles, dict(regions)).part(lambda name: True)

    def detach(self, regions: Iterable[Region], others: Iterable[Region]) -> None:
        """Have memory of its own, with anything in it, in place of the segments of these, which other processes map.

        Of the others, what lies in those segments is copied. Raises OSError; then some may have it.
        """
        kept: dict[int, list[tuple[int, int]]] = {region.segment: [] for region in regions if region.size_bytes}
        for region in others:
            if region.segment in kept:
                kept[region.segment].append((region.offset_bytes, _end(region)))
        for segment, places in kept.items():
            self._segments[segment].detach(places)

    def adopt(self, held: HeldMemory, regions: Mapping[str, Region]) -> None:
        """Have the memory of others in place of the segments that `regions` lie in, whose tensors lie alike there.

        Raises PeerDiedError, FrameError; then some may be there.
        """
        own: dict[int, int] = {}
        for name, region in held.regions.items():
            place = regions[name]
            assert place._replace(segment=0) == region._replace(segment=0), (name, place, region)
            if region.size_bytes:
                assert own.setdefault(region.segment, place.segment) == place.segment, (name, place, region)
        for number, handle in enumerate(held.segments):
            self._segments[own[number]].adopt(handle)

    def close(self) -> None:
        """Nobody can hold it from now on who does not already."""
        for segment in self._segments:
            segment.close()

    def _add_segment(self, size_bytes: int) -> int:
        self._segments.append(SharedSegment.create(size_bytes, self._label))
        return len(self._segments) - 1


def _adjacent(regions: Iterable[Region]) -> Iterator[Region]:
    """The regions in order, those with nothing but padding between them as one: they may share pages."""
    run: Region | None = None
    for region in sorted(region for region in regions if region.size_bytes):
        if run is None or region.segment != run.segment or region.offset_bytes - _end(run) >= ALIGNMENT:
            if run is not None:
                yield run
            run = region
        else:
            run = run._replace(size_bytes=_end(region) - run.offset_bytes)
    if run is not None:
        yield run


def _end(region: Region) -> int:
    return region.offset_bytes + region.size_bytes
