"""Numbers that a GPU writes into shared memory by itself, in the order of what it was given.

A stream-ordered write (CUDA driver API, `cuStreamWriteValue64`) costs its issuer a call that waits for nothing, and
the GPU no kernel. The memory may be that of a memfd which other processes map: they see how far the GPU is without
CUDA, and after this process has died.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

_SUCCESS = 0
_MAPPED = 2  # CU_MEMHOSTREGISTER_DEVICEMAP


class StreamWrites:
    """Writes to some memory from the current stream of a device. For the use of one thread."""

    def __init__(self, memory: memoryview, device: torch.device) -> None:
        """`memory` begins at a page boundary and stays mapped, and known to CUDA, until the process ends.

        To end that earlier could block behind what the GPU hangs in. Raises OSError or RuntimeError where the driver
        cannot do it.
        """
        library = ctypes.CDLL("libcuda.so.1")
        torch.cuda.current_stream(device).synchronize()  # there is a context from now on
        host = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        _check("cuMemHostRegister", library.cuMemHostRegister_v2(host, ctypes.c_size_t(len(memory)), _MAPPED))
        address = ctypes.c_uint64()
        _check("cuMemHostGetDevicePointer", library.cuMemHostGetDevicePointer_v2(ctypes.byref(address), host, 0))
        self._address = address.value
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._write = library.cuStreamWriteValue64_v2  # the first version needs a setting of the kernel module
        self._write.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint)
        self._stream_of = torch._C._cuda_getCurrentRawStream

    def to(self, offset: int) -> Callable[[int], None]:
        """A function that has the 64-bit word at `offset` bytes become a number when the current stream has come to
        where it was called: all that the stream was given before is then over.

        The function raises RuntimeError if CUDA is of no more use. One, and with all that it needs at hand: it is
        called twice a collective.
        """
        put, stream_of, index, address = self._write, self._stream_of, self._index, self._address + offset

        def write(number: int) -> None:
            code = put(stream_of(index), address, number, 0)
            if code:
                _check("cuStreamWriteValue64", code)

        return write


def _check(function: str, code: int) -> None:
    if code != _SUCCESS:
        raise RuntimeError(f"{function} failed with CUDA error {code}")
