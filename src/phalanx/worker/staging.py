"""Between host and device without waiting: many small arrays in one copy each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes. A view of the staged buffer as a wider type must start at a multiple of that type's size."""


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the same shapes and types. On a GPU the copy is in stream order and nobody waits for it.

    On a CPU the tensors share the arrays' memory, which must not be written to afterwards.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    offsets = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    # torch keeps a pinned block from being used again until the copies out of it are done, so a fresh one is safe.
    pinned = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
    buffer = pinned.numpy()
    for offset, array in zip(offsets, arrays, strict=False):
        buffer[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    staged = pinned.to(device, non_blocking=True)
    return [
        staged[offset : offset + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for offset, array in zip(offsets, arrays, strict=False)
    ]


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a GPU, in pinned memory that is right only once the stream has come to this point."""
    if tensor.device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
