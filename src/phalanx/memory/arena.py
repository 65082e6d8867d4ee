"""Storage for what is costly to make again: weights and KV cache.

It can outlive the worker that filled it: a Holder keeps it, and the next worker's arena is made from what the Holder
says. It has no name in the file system, so nothing can be left behind. On a GPU whose driver cannot share memory, and
where nobody would hold it, it comes from torch's allocator and ends with the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from phalanx.memory.cuda_driver import CudaDriver
from phalanx.memory.gpu_pieces import GpuPieces
from phalanx.memory.held import HeldMemory, Region
from phalanx.memory.host_segments import HostSegments

Allocate = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""What Arena.allocate is."""


class Backing(Protocol):
    """Where an arena's memory comes from, if others can hold it."""

    def reserve(self, size_bytes: int) -> Region:
        """Room for a tensor. Raises OSError, or on a GPU torch.OutOfMemoryError, when there is none."""

    def tensor(self, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """What lies there, in one dimension. It is not empty."""

    def begin_part(self, size_bytes: int | None) -> None:
        """What comes now is given back, or held, apart from what came before; it takes about so much, if known."""

    def release(self, regions: Iterable[Region]) -> None:
        """Give their memory back, as far as nothing else lies in it: until `restore` they hold nothing."""

    def restore(self, regions: Iterable[Region]) -> None:
        """Have memory there again, with anything in it. Raises torch.OutOfMemoryError on a GPU without room."""

    def describe(self, regions: Mapping[str, Region]) -> HeldMemory:
        """These tensors, for who is to hold their memory."""

    def close(self) -> None:
        """Nobody can hold it from now on who does not already. Tensors stay usable."""


class Arena:
    """Allocates tensors, which live as long as somebody has them. Not thread-safe."""

    def __init__(
        self, label: str, device: torch.device, held: HeldMemory | None = None, *, driver: CudaDriver | None = None
    ) -> None:
        """With `held`, what it names is there already: `allocate` gives that memory, with what is in it.

        On a GPU memory can be held that comes by way of `driver`. Raises PeerDiedError if whoever holds it is gone,
        FrameError if they have let go of it, DriverError.
        """
        self.device = device
        self.regions: dict[str, Region] = {}
        """Of what was allocated."""
        self.held: dict[str, Region] = dict(held.regions) if held is not None else {}
        """What was there before."""
        self._backing: Backing | None = None
        if device.type == "cpu":
            self._backing = HostSegments(label, held)
        elif driver is not None:
            self._backing = GpuPieces(label, device, driver, held)
        assert held is None or self._backing is not None, "it could not be taken over"

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor: one that was held as it is, else an uninitialised one.

        Raises torch.OutOfMemoryError on a GPU and OSError on a CPU when there is no room; a CPU's memory is taken only
        when it is first written.
        """
        assert name not in self.regions, f"{name} is allocated twice"
        if self._backing is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        size_bytes = math.prod(shape) * dtype.itemsize
        region = self.held.get(name) or self._backing.reserve(size_bytes)
        assert region.size_bytes == size_bytes, f"{name}: {region.size_bytes} bytes are held, {size_bytes} are needed"
        self.regions[name] = region
        if size_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return self._backing.tensor(region, dtype).view(shape)

    def begin_part(self, size_bytes: int | None = None) -> None:
        """What is allocated from now on lies in other segments than what was before, and can be held without it.

        `size_bytes`, where it is known, is about how much it is: a GPU's memory is then taken in few pieces.
        """
        if self._backing is not None:
            self._backing.begin_part(size_bytes)

    def release(self, names: Sequence[str]) -> None:
        """Give the memory of these tensors back to the system; they need not be adjacent. They stay where they are.

        On a CPU that is whole pages: they may read as zeros from now on, for all who share them, and what is written to
        them takes memory again. On a GPU it is pieces with nothing else in them: nobody may use these tensors before
        `restore`, and the memory is the GPU's again when nobody else holds it.
        """
        if self._backing is not None:
            self._backing.release([self.regions[name] for name in names])

    def restore(self, names: Sequence[str]) -> None:
        """Have memory where tensors lie that were released: anything may be in it.

        Raises torch.OutOfMemoryError when there is no room on a GPU. Then they are as after `release`.
        """
        if self._backing is not None:
            self._backing.restore([self.regions[name] for name in names])

    def detach(self, names: Sequence[str]) -> None:
        """On a CPU: these tensors are about to be written to, and other processes compute with them, too. From now on
        they have memory of their own, where they are, with anything in it; others keep what there was.

        Raises OSError; then anything may be in some of them.
        """
        assert isinstance(self._backing, HostSegments)
        others = [region for name, region in self.regions.items() if name not in names]
        self._backing.detach([self.regions[name] for name in names], others)

    def adopt(self, held: HeldMemory) -> None:
        """On a CPU: have these tensors, which another process has allocated as this one did, in place of its own.

        Raises PeerDiedError if whoever holds them is gone, FrameError if they have let go of them; then some may have
        come.
        """
        assert isinstance(self._backing, HostSegments)
        self._backing.adopt(held, self.regions)

    @property
    def can_be_held(self) -> bool:
        """Whether it has memory of its own, to be described, and given back."""
        return self._backing is not None

    def describe(self, is_kept: Callable[[str], bool] = lambda name: True) -> HeldMemory:
        """What can be held of it: tensors whose names are to be kept, and no segment without one.

        On a GPU nothing that was released.
        """
        assert self._backing is not None
        return self._backing.describe({name: region for name, region in self.regions.items() if is_kept(name)})

    def close(self) -> None:
        """Nobody can hold it from now on who does not already. Tensors stay usable. May be called more than once."""
        if self._backing is not None:
            self._backing.close()

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
