"""CUDA's driver as ctypes sees it, for a GPU whose memory is memfds: with descriptors that really travel."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import torch

GRANULARITY = 1 << 16
ERRORS = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY"}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FIXED = 0x10
_NOTHING = 0


class FakeCuda:
    """Of one process. Pointers come as `byref` makes them."""

    def __init__(self, *, total_bytes: int = 1 << 24, attributes: tuple[int, ...] = (102, 103)) -> None:
        self.total_bytes = total_bytes
        self.created_bytes = 0
        self.attributes = attributes
        self.handles: dict[int, int] = {}
        """Descriptors of those that are not released."""
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.num_waits = 0

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = int(attribute in self.attributes)
        return 0

    def cuDeviceTotalMem_v2(self, value: Any, device: Any) -> int:
        value._obj.value = self.total_bytes
        return 0

    def cuMemGetAllocationGranularity(self, value: Any, properties: Any, option: int) -> int:
        value._obj.value = GRANULARITY
        return 0

    def cuMemAddressReserve(self, address: Any, size: Any, alignment: Any, at: Any, flags: Any) -> int:
        assert size.value % GRANULARITY == 0
        found = _libc.mmap(None, size.value, _NOTHING, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.reserved[found] = size.value
        address._obj.value = found
        return 0

    def cuMemCreate(self, handle: Any, size: Any, properties: Any, flags: Any) -> int:
        assert size.value % GRANULARITY == 0 and properties._obj.requested_handle_types == 1
        if self.created_bytes + size.value > self.total_bytes:
            return 2
        self.created_bytes += size.value
        fd = os.memfd_create("a piece")
        os.ftruncate(fd, size.value)
        handle._obj.value = self._new_handle(fd)
        return 0

    def cuMemExportToShareableHandle(self, fd: Any, handle: Any, kind: int, flags: Any) -> int:
        fd._obj.value = os.dup(self.handles[handle.value])
        os.set_inheritable(fd._obj.value, True)
        return 0

    def cuMemImportFromShareableHandle(self, handle: Any, fd: Any, kind: int) -> int:
        handle._obj.value = self._new_handle(os.dup(fd.value))
        return 0

    def cuMemMap(self, address: Any, size: Any, offset: Any, handle: Any, flags: Any) -> int:
        fd = self.handles[handle.value]
        (start,) = (start for start, length in self.reserved.items() if start <= address.value < start + length)
        assert address.value + size.value <= start + self.reserved[start], "beyond what is reserved"
        if os.fstat(fd).st_size != size.value:
            return 1
        _libc.mmap(address.value, size.value, _NOTHING, mmap.MAP_SHARED | _FIXED, fd, 0)
        self.mapped[address.value] = size.value
        return 0

    def cuMemSetAccess(self, address: Any, size: Any, access: Any, count: Any) -> int:
        assert access._obj.flags == 3 and count.value == 1 and self.mapped[address.value] == size.value
        ctypes.CDLL(None).mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        return 0

    def cuMemRelease(self, handle: Any) -> int:
        os.close(self.handles.pop(handle.value))
        return 0

    def cuMemUnmap(self, address: Any, size: Any) -> int:
        assert self.mapped.pop(address.value) == size.value
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
        _libc.mmap(address.value, size.value, _NOTHING, flags, -1, 0)
        return 0

    def cuMemAddressFree(self, address: Any, size: Any) -> int:
        assert self.reserved.pop(address.value) == size.value and not self.mapped
        _libc.munmap(address.value, size.value)
        return 0

    def cuCtxSynchronize(self) -> int:
        self.num_waits += 1
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = ERRORS[code].encode()
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"in other words"
        return 0

    def _new_handle(self, fd: int) -> int:
        handle = 1000 + fd
        self.handles[handle] = fd
        return handle


def bytes_at(address: int, size_bytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """In place of that of gpu_pieces.py: what is mapped at an address of the host."""
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)
