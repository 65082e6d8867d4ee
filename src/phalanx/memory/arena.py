"""Storage for what is costly to make again: weights and KV cache.

On a CPU it is anonymous shared memory, not the process's own heap, so that it can outlive the worker that filled it: a
Holder keeps it, and the next worker's arena is made from what the Holder says. It has no name in the file system, so
nothing can be left behind. On a GPU it comes from torch's allocator, and ends with the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch

from phalanx.memory.held import HeldMemory, Region
from phalanx.transport.shared_memory import SharedSegment

SEGMENT_BYTES = 1 << 30
"""Tensors share segments of this size: whoever holds the memory of a host's ranks has a descriptor for each, and may
have a thousand. What is not written to takes no memory."""

ALIGNMENT = 64
"""One cache line, and what vector loads want."""


Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""What Arena.allocate is."""


class Arena:
    """Allocates tensors, which live as long as somebody has them. Not thread-safe."""

    def __init__(self, label: str, device: torch.device, held: HeldMemory | None = None) -> None:
        """With `held`, what it names is there already, on a CPU: `allocate` gives that memory, with what is in it.

        Raises PeerDiedError if whoever holds it is gone, FrameError if they have let go of it.
        """
        assert held is None or device.type == "cpu", "only a CPU's memory can be held"
        self.device = device
        self.regions: dict[str, Region] = {}
        """Of what was allocated."""
        self.held: dict[str, Region] = dict(held.regions) if held is not None else {}
        """What was there before."""
        self._on_device: dict[str, torch.Tensor] = {}
        """What was allocated there."""
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

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor: one that was held as it is, else an uninitialised one.

        Memory is taken from the system only when it is first written. Raises torch.OutOfMemoryError on a GPU and
        OSError on a CPU when there is no room.
        """
        assert name not in self.regions, f"{name} is allocated twice"
        if self.device.type != "cpu":
            self._on_device[name] = torch.empty(shape, dtype=dtype, device=self.device)
            return self._on_device[name]
        size_bytes = math.prod(shape) * dtype.itemsize
        region = self.held.get(name) or self._reserve(size_bytes)
        assert region.size_bytes == size_bytes, f"{name}: {region.size_bytes} bytes are held, {size_bytes} are needed"
        self.regions[name] = region
        if size_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        end = region.offset_bytes + size_bytes
        memory = self._segments[region.segment].buf[region.offset_bytes : end]
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    @property
    def names(self) -> Sequence[str]:
        """Of what was allocated."""
        return [*self.regions, *self._on_device]

    def begin_part(self) -> None:
        """What is allocated from now on lies in other segments than what was before, and can be held without it."""
        self._shared = None

    def release(self, names: Sequence[str]) -> None:
        """Give the memory of these tensors back to the system, in whole pages; they need not be adjacent.

        On a CPU they stay where they are, and may read as zeros from now on, for all who share them; what is written to
        them takes memory again. On a GPU there is none before `reclaim`.
        """
        if self.device.type != "cpu":
            for name in names:
                self._on_device[name].untyped_storage().resize_(0)
            torch.cuda.empty_cache()
        for run in _adjacent([self.regions[name] for name in names] if self.device.type == "cpu" else []):
            self._segments[run.segment].release(run.offset_bytes, _end(run))

    def reclaim(self, names: Sequence[str]) -> None:
        """Have memory for them again, on a GPU at other addresses; it may hold anything.

        Raises torch.OutOfMemoryError on a GPU that others have taken it on.
        """
        for name in names if self.device.type != "cpu" else ():
            tensor = self._on_device[name]
            tensor.untyped_storage().resize_(tensor.nbytes)

    def describe(self, is_kept: Callable[[str], bool] = lambda name: True) -> HeldMemory:
        """What can be held of it: tensors whose names are to be kept, and no segment without one. Only on a CPU."""
        assert self.device.type == "cpu"
        kept = {name: region for name, region in self.regions.items() if is_kept(name)}
        used = sorted({region.segment for region in kept.values() if region.size_bytes})
        number = {segment: i for i, segment in enumerate(used)}
        return HeldMemory(
            segments=tuple(self._segments[segment].handle for segment in used),
            regions={name: region._replace(segment=number.get(region.segment, 0)) for name, region in kept.items()},
        )

    def close(self) -> None:
        """Nobody can hold it from now on who does not already. Tensors stay usable. May be called more than once."""
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reserve(self, size_bytes: int) -> Region:
        if size_bytes > SEGMENT_BYTES:
            return Region(self._add_segment(size_bytes), 0, size_bytes)
        if self._shared is None or self._free_from + size_bytes > SEGMENT_BYTES:
            self._shared, self._free_from = self._add_segment(SEGMENT_BYTES), 0
        region = Region(self._shared, self._free_from, size_bytes)
        self._free_from += -(-size_bytes // ALIGNMENT) * ALIGNMENT
        return region

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
