"""A GPU's memory for an arena: pieces with descriptors, which others can hold without CUDA.

All lie one after the other in one range of addresses, so that a tensor may begin in one piece and end in another. What
is given back leaves its addresses free, and other pieces come to the same place: CUDA graphs know tensors by these.
"""

from __future__ import annotations

import os
import secrets
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from phalanx.errors import DriverError
from phalanx.memory.cuda_driver import OUT_OF_MEMORY, CudaDriver
from phalanx.memory.held import HeldMemory, PieceHandle, Region
from phalanx.transport.descriptors import DescriptorOffers, take_descriptors

LARGEST_BYTES = 4 << 30
"""Of a piece. Each takes a descriptor wherever it is held, where there may be a thousand for all ranks, and a tenth of
a millisecond to take over."""

ALIGNMENT = 512
"""As torch's own."""


class GpuPieces:
    """Pieces as they are needed, after those that were there. All memory is taken at once."""

    def __init__(self, label: str, device: torch.device, driver: CudaDriver, held: HeldMemory | None) -> None:
        """`driver` is of this device. Raises PeerDiedError if whoever holds the memory is gone, FrameError if they
        have let go of it, DriverError.
        """
        self._label = label
        self._device = device
        self._driver = driver
        self._granularity = driver.granularity()
        self._handles: list[PieceHandle] = []
        self._starts: list[int] = []
        """Of each piece, in the range."""
        self._absent: set[int] = set()
        """Pieces that were given back."""
        self._in_use: set[Region] = set()
        self._offers: DescriptorOffers | None = None
        """Of the pieces that are made here."""
        self._free_from = 0
        self._expected_bytes = 0
        """What is still to come, as far as it is known: so much is taken in as few pieces as can be."""
        # Twice as much as can ever be there: addresses cost nothing.
        self._range = _Range(driver, self._rounded(2 * driver.total_bytes()))
        with ExitStack() as undo:
            undo.callback(self.close)
            if held is not None:
                self._take(held.pieces)
            undo.pop_all()
        self._free_from = self._end

    def reserve(self, size_bytes: int) -> Region:
        """Room for a tensor. Raises torch.OutOfMemoryError when there is none."""
        start = -(-self._free_from // ALIGNMENT) * ALIGNMENT
        while (missing_bytes := start + size_bytes - self._end) > 0:
            self._add_piece(self._rounded(min(max(missing_bytes, self._expected_bytes), LARGEST_BYTES)))
        self._free_from = start + size_bytes
        piece = max(bisect_right(self._starts, start) - 1, 0)
        return Region(piece, start - self._starts[piece] if self._starts else 0, size_bytes)

    def tensor(self, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """What lies there, in one dimension. It is not empty."""
        self._in_use.add(region)
        address = self._range.address + self._starts[region.segment] + region.offset_bytes
        return bytes_at(address, region.size_bytes, self._device, self._range).view(dtype)

    def begin_part(self, size_bytes: int | None) -> None:
        """What comes now goes into other pieces; it takes about so much, if that is known."""
        self._free_from = self._end
        self._expected_bytes = size_bytes or 0

    def release(self, regions: Iterable[Region]) -> None:
        """Give the pieces back that these tensors, and none in use, lie in. Nothing may be computed on them before
        `restore`. Whoever else has such a piece mapped, or holds it, has it still.
        """
        regions = list(regions)
        self._in_use.difference_update(regions)
        gone = self._all_pieces_of(regions) - self._all_pieces_of(self._in_use) - self._absent
        if gone:
            self._driver.wait()
        for piece in sorted(gone):
            self._range.unmap(self._starts[piece])
            if self._offers is not None:
                self._offers.withdraw(self._handles[piece].descriptor)
            self._absent.add(piece)

    def restore(self, regions: Iterable[Region]) -> None:
        """Have pieces again where these tensors lie, with anything in them.

        Raises torch.OutOfMemoryError when there is no room; then what these tensors took is given back.
        """
        regions = list(regions)
        self._in_use.update(regions)
        with ExitStack() as undo:
            undo.callback(self.release, regions)
            for piece in sorted(self._all_pieces_of(regions) & self._absent):
                memory, handle = self._new_piece(self._handles[piece].size_bytes)
                self._map(self._starts[piece], memory, handle.size_bytes)
                self._handles[piece] = handle
                self._absent.remove(piece)
            undo.pop_all()

    def describe(self, regions: Mapping[str, Region]) -> HeldMemory:
        """These tensors, as far as they are there, and the pieces that they lie in."""
        regions = {name: region for name, region in regions.items() if self._absent.isdisjoint(self._pieces_of(region))}
        used = sorted(self._all_pieces_of(regions.values()))
        number = {piece: i for i, piece in enumerate(used)}
        return HeldMemory(
            segments=(),
            regions={name: region._replace(segment=number.get(region.segment, 0)) for name, region in regions.items()},
            pieces=tuple(self._handles[piece] for piece in used),
        )

    def close(self) -> None:
        """Nobody can hold it from now on who does not already. Tensors stay usable."""
        if self._offers is not None:
            self._offers.close()

    @property
    def _end(self) -> int:
        """Of the last piece, in the range."""
        return self._starts[-1] + self._handles[-1].size_bytes if self._starts else 0

    def _take(self, handles: Sequence[PieceHandle]) -> None:
        with ExitStack() as stack:
            fds = take_descriptors([handle.descriptor for handle in handles])
            for fd in fds:
                stack.callback(os.close, fd)
            for fd, handle in zip(fds, handles, strict=True):
                self._append(self._driver.take(fd), handle)

    def _add_piece(self, size_bytes: int) -> None:
        self._append(*self._new_piece(size_bytes))
        self._expected_bytes = max(self._expected_bytes - size_bytes, 0)

    def _new_piece(self, size_bytes: int) -> tuple[int, PieceHandle]:
        """Memory that is offered and mapped nowhere yet. Raises torch.OutOfMemoryError."""
        try:
            memory = self._driver.create(size_bytes)
        except DriverError as error:
            if error.name != OUT_OF_MEMORY:
                raise
            raise torch.OutOfMemoryError(f"{size_bytes} bytes for the {self._label}: {error}") from error
        if self._offers is None:
            self._offers = DescriptorOffers()
        descriptor = self._offers.offer(self._driver.export(memory), self._label)
        return memory, PieceHandle(descriptor, size_bytes, secrets.randbits(63))

    def _append(self, memory: int, handle: PieceHandle) -> None:
        """Behind the last one."""
        start = self._end
        self._map(start, memory, handle.size_bytes)
        self._starts.append(start)
        self._handles.append(handle)

    def _map(self, start: int, memory: int, size_bytes: int) -> None:
        """It then stays for as long as it is mapped, or somebody has its descriptor."""
        try:
            self._range.map(start, size_bytes, memory)
        finally:
            self._driver.release(memory)

    def _all_pieces_of(self, regions: Iterable[Region]) -> set[int]:
        return {piece for region in regions for piece in self._pieces_of(region)}

    def _pieces_of(self, region: Region) -> range:
        if region.size_bytes == 0:
            return range(0)
        last = self._starts[region.segment] + region.offset_bytes + region.size_bytes - 1
        return range(region.segment, bisect_right(self._starts, last))

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self._granularity) * self._granularity


class _Range:
    """Addresses of this process, and what is mapped there, for as long as a tensor has it."""

    def __init__(self, driver: CudaDriver, size_bytes: int) -> None:
        self.address = driver.reserve(size_bytes)
        self._driver = driver
        self._mapped: dict[int, int] = {}
        """Sizes of pieces, by where they begin."""
        # Not when the process ends: CUDA may be gone by then, and what is mapped goes with the process.
        weakref.finalize(self, _give_back, driver, self.address, size_bytes, self._mapped).atexit = False

    def map(self, start: int, size_bytes: int, memory: int) -> None:
        """Have a piece there, from the beginning of the range on."""
        self._driver.map(self.address + start, size_bytes, memory)
        self._mapped[start] = size_bytes

    def unmap(self, start: int) -> None:
        """Have nothing there any more. The GPU must have nothing to do with it."""
        self._driver.unmap(self.address + start, self._mapped.pop(start))


def _give_back(driver: CudaDriver, address: int, size_bytes: int, mapped: Mapping[int, int]) -> None:
    driver.wait()
    for start, mapped_bytes in mapped.items():
        driver.unmap(address + start, mapped_bytes)
    driver.free(address, size_bytes)


class _Exposed:
    """Bytes of a GPU, as torch takes them over; they keep `owner`."""

    def __init__(self, address: int, size_bytes: int, owner: object) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        self._owner = owner


def bytes_at(address: int, size_bytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """A tensor of bytes over memory that is there for as long as `owner` is."""
    return torch.as_tensor(_Exposed(address, size_bytes, owner), device=device)
