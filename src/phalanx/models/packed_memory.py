"""Packed weights in memory that other processes have too.

oneDNN's own layout is a block of bytes and its description. Here the bytes lie in memory from an allocator, beside the
description, and a worker that gets this memory makes packed tensors over it: nothing is packed, nor copied, again.
torch does the same for models that it has compiled ahead of time; its C interface for these has what it takes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.memory.arena import Allocate

ALIGNMENT = 64
"""What oneDNN allocates by."""

_STATE = "packing"


class PackedPlace:
    """Room for some packed weights of one shape."""

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, memory: PackedMemory) -> None:
        """`shape` is [weights, O, I]. `name` is that of a parameter, whose place is another."""
        self._names = f"{name}.packed", f"{name}.layout"
        self._shape = shape
        self._dtype = dtype
        self._memory = memory
        self._bytes: Tensor | None = None
        self._layout: Tensor | None = None
        sizes = [memory.filled.get(name) for name in self._names]
        if sizes[0] is not None and sizes[1] is not None:
            self._open(sizes[0] // shape[0], sizes[1])

    @property
    def name(self) -> str:
        """Of the memory that the weights lie in."""
        return self._names[0]

    @property
    def is_open(self) -> bool:
        """Whether there is any yet."""
        return self._bytes is not None

    def keep(self, index: int, packed: Tensor) -> Tensor:
        """Copy a packed weight to its place, and give the one that lies there."""
        layout: Tensor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
        num_bytes: int = torch.ops.mkldnn._nbytes(packed)
        if self._bytes is None or self._layout is None:
            self._open(-(-num_bytes // ALIGNMENT) * ALIGNMENT, len(layout))
            assert self._bytes is not None and self._layout is not None
            self._layout.copy_(layout)
        assert torch.equal(self._layout, layout), "weights of one shape are packed alike"
        ctypes.memmove(self._bytes[index].data_ptr(), torch.ops.mkldnn.data_ptr(packed), num_bytes)
        return self._over(index)

    def found(self) -> list[Tensor]:
        """All that lie here."""
        return [self._over(index) for index in range(self._shape[0])]

    def _open(self, stride: int, layout_bytes: int) -> None:
        packed, layout = self._names
        self._bytes = self._memory.allocate(packed, (self._shape[0], stride), torch.uint8)
        self._layout = self._memory.allocate(layout, (layout_bytes,), torch.uint8)

    def _over(self, index: int) -> Tensor:
        assert self._bytes is not None and self._layout is not None
        return _over(self._bytes[index].data_ptr(), self._layout, self._shape[1:], self._dtype)


class PackedMemory:
    """Gives the places of a model's packed weights."""

    def __init__(self, allocate: Allocate, filled: Mapping[str, int]) -> None:
        """`filled` are the sizes in bytes of what `allocate` gives with what somebody has written to it before."""
        self.allocate = allocate
        self.filled = filled

    @property
    def is_filled(self) -> bool:
        """Whether somebody else has been here."""
        return _STATE in self.filled

    def state(self, size: int) -> NDArray[np.int64]:
        """Numbers that all who have this memory share. At first they are 0."""
        numbers: NDArray[np.int64] = self.allocate(_STATE, (size,), torch.int64).numpy()
        return numbers


def _over(address: int, layout: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A packed weight over memory that somebody else keeps."""
    torch_cpu, handle = _torch_cpu(), ctypes.c_void_p()
    sizes, strides = (ctypes.c_int64 * 2)(*shape), (ctypes.c_int64 * 2)(shape[1], 1)
    failed = torch_cpu.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(address),
        ctypes.c_int64(len(shape)),
        sizes,
        strides,
        ctypes.c_int64(0),
        ctypes.c_int32(getattr(torch_cpu, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()),
        ctypes.c_int32(torch_cpu.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(torch_cpu.aoti_torch_layout__mkldnn()),
        ctypes.c_void_p(layout.data_ptr()),
        ctypes.c_int64(len(layout)),
    )
    assert not failed, "torch did not make a packed tensor"
    # The function for a single one does not let go of the handle: it leaks.
    packed: Tensor = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(handle)])[0]
    return packed


@functools.cache
def _torch_cpu() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _capsule(handle: ctypes.c_void_p) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(handle, None, None)
