"""Storage for what is costly to make again: weights and KV cache.

On a CPU it is anonymous shared memory (a memfd), not the process's own heap, so that another process can hold it and it
outlives the worker that filled it. It has no name in the file system, so nothing can be left behind. On a GPU it comes
from torch's allocator.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

SEGMENT_BYTES = 64 << 20
"""Small tensors share a segment of this size: a model has hundreds of them, and a process may hold few files."""

ALIGNMENT = 64
"""One cache line, and what vector loads want."""


class Region(NamedTuple):
    """Where a tensor lies: segment number, offset and size in bytes."""

    segment: int
    offset_bytes: int
    size_bytes: int


class Arena:
    """Allocates tensors that live as long as the arena. Not thread-safe."""

    def __init__(self, label: str, device: torch.device) -> None:
        self.device = device
        self.regions: dict[str, Region] = {}
        self._label = label
        self._segments: list[mmap.mmap] = []
        self._shared: int | None = None
        """The segment that small tensors go into."""
        self._free_from = 0

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Memory is taken from the system only when it is first written.

        Raises torch.OutOfMemoryError on a GPU and OSError on a CPU when there is no room.
        """
        assert name not in self.regions, f"{name} is allocated twice"
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        size_bytes = math.prod(shape) * dtype.itemsize
        region = self._reserve(size_bytes)
        self.regions[name] = region
        if size_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(
            self._segments[region.segment], dtype=dtype, count=math.prod(shape), offset=region.offset_bytes
        ).view(shape)

    def release(self, names: Sequence[str]) -> None:
        """Give the memory of these tensors back to the system, in whole pages; they need not be adjacent.

        They stay where they are, and may read as zeros from now on; what is written to them takes memory again. On a
        GPU nothing is given back.
        """
        for run in _adjacent([self.regions[name] for name in names] if self.device.type == "cpu" else []):
            start = -(-run.offset_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (run.offset_bytes + run.size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop:
                self._segments[run.segment].madvise(mmap.MADV_REMOVE, start, stop - start)

    def _reserve(self, size_bytes: int) -> Region:
        if size_bytes > SEGMENT_BYTES:
            return Region(self._add_segment(size_bytes), 0, size_bytes)
        if self._shared is None or self._free_from + size_bytes > SEGMENT_BYTES:
            self._shared, self._free_from = self._add_segment(SEGMENT_BYTES), 0
        region = Region(self._shared, self._free_from, size_bytes)
        self._free_from += -(-size_bytes // ALIGNMENT) * ALIGNMENT
        return region

    def _add_segment(self, size_bytes: int) -> int:
        self._segments.append(_map_anonymous(self._label, size_bytes))
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


def _map_anonymous(label: str, size_bytes: int) -> mmap.mmap:
    descriptor = os.memfd_create(f"phalanx-{label}", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
        return mmap.mmap(descriptor, size_bytes)  # holds a descriptor of its own
    finally:
        os.close(descriptor)
