"""CUDA's virtual memory management, as its driver offers it: pieces of a GPU's memory that have a file descriptor.

Memory, addresses and the mapping of one to the other are three things there. Memory lives as long as it is mapped
somewhere, or somebody has a handle or a descriptor of it, whichever process has made it.

Source: CUDA Driver API, "Virtual Memory Management"; numbers and structures are those of cuda.h.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Protocol

from phalanx.errors import DriverError

LIBRARY = "libcuda.so.1"

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

_HAS_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_HAS_DESCRIPTORS = 103  # CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_READ_AND_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM
_NO_FLAGS = c_uint64(0)


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_handle_meta_data", c_void_p),
        ("flags", c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", c_int))


class CudaFunction(Protocol):
    """One of the driver's: returns 0, or the number of an error."""

    def __call__(self, *arguments: object) -> int: ...


class CudaLibrary(Protocol):
    """What the driver's library looks like to ctypes."""

    def __getattr__(self, name: str) -> CudaFunction: ...


class CudaDriver:
    """The driver, for one GPU. Sizes and addresses are multiples of `granularity`. Every method raises DriverError."""

    def __init__(self, device: int, library: CudaLibrary | None = None) -> None:
        """`device` as torch counts: of those that CUDA_VISIBLE_DEVICES names. Makes torch's context of it this
        thread's, and it if there is none yet.
        """
        self._library = library if library is not None else _load()
        self._location = _Location(_DEVICE, device)
        self._properties = _Properties(_PINNED, _DESCRIPTOR, self._location, None)
        self._call("cuInit", 0)
        self._device, self._context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(self._device), device)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._call("cuCtxSetCurrent", self._context)

    @property
    def can_share(self) -> bool:
        """Whether this GPU and its driver know memory with descriptors at all."""
        return bool(self._attribute(_HAS_VIRTUAL_MEMORY) and self._attribute(_HAS_DESCRIPTORS))

    def granularity(self) -> int:
        """In bytes: what sizes and addresses are multiples of."""
        found = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(found), byref(self._properties), _MINIMUM)
        return found.value

    def total_bytes(self) -> int:
        """Of the GPU, or of the part of it that this process sees (MIG)."""
        found = c_size_t()
        self._call("cuDeviceTotalMem_v2", byref(found), self._device)
        return found.value

    def reserve(self, size_bytes: int) -> int:
        """Addresses, with nothing there; gives the first."""
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), c_size_t(size_bytes), c_size_t(0), c_uint64(0), _NO_FLAGS)
        return address.value

    def create(self, size_bytes: int) -> int:
        """A piece of memory, mapped nowhere: its handle, which is to be released. What is in it is undefined."""
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), c_size_t(size_bytes), byref(self._properties), _NO_FLAGS)
        return handle.value

    def export(self, handle: int) -> int:
        """A descriptor for a piece, which is the caller's to close. Only who has created the piece can do so."""
        fd = c_int(-1)
        self._call("cuMemExportToShareableHandle", byref(fd), c_uint64(handle), _DESCRIPTOR, _NO_FLAGS)
        os.set_inheritable(fd.value, False)
        return fd.value

    def take(self, fd: int) -> int:
        """A handle, which is to be released, for the piece that a descriptor, which is not used up, is of."""
        handle = c_uint64()
        self._call("cuMemImportFromShareableHandle", byref(handle), c_void_p(fd), _DESCRIPTOR)
        return handle.value

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Have the piece, which has this size, at these addresses, for this GPU to read and write."""
        self._call("cuMemMap", c_uint64(address), c_size_t(size_bytes), c_size_t(0), c_uint64(handle), _NO_FLAGS)
        access = _Access(self._location, _READ_AND_WRITE)
        try:
            self._call("cuMemSetAccess", c_uint64(address), c_size_t(size_bytes), byref(access), c_size_t(1))
        except DriverError:
            self.unmap(address, size_bytes)
            raise

    def release(self, handle: int) -> None:
        """The handle is of no use any more; the piece stays where it is mapped."""
        self._call("cuMemRelease", c_uint64(handle))

    def unmap(self, address: int, size_bytes: int) -> None:
        """Of whole pieces. Nothing may be computed on them any more."""
        self._call("cuMemUnmap", c_uint64(address), c_size_t(size_bytes))

    def free(self, address: int, size_bytes: int) -> None:
        """Give reserved addresses back, where nothing is mapped any more."""
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(size_bytes))

    def wait(self) -> None:
        """Until the GPU has nothing more to do for this process. In any thread, whose context it then is."""
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")

    def _attribute(self, number: int) -> int:
        found = c_int()
        self._call("cuDeviceGetAttribute", byref(found), number, self._device)
        return found.value

    def _call(self, name: str, *arguments: object) -> None:
        function: CudaFunction | None = getattr(self._library, name, None)
        if function is None:
            raise DriverError(name, "no such function", "the driver is too old")
        if code := function(*arguments):
            raise DriverError(name, self._words("cuGetErrorName", code), self._words("cuGetErrorString", code))

    def _words(self, function: str, code: int) -> str:
        text = c_char_p()
        getattr(self._library, function)(code, byref(text))
        return text.value.decode() if text.value else f"error {code}"


def _load() -> CudaLibrary:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DriverError(f"loading {LIBRARY}", "no driver", str(error)) from error
