"""Work on a GPU that is given to it once and repeated from a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

_WAITS = "called a synchronizing"  # what torch says then


class CudaCapture:
    """Makes graphs that share one pool of memory: only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = cast(Any, torch.cuda).Stream(device)  # untyped in torch's stubs
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats `work`, in the order of the stream that is current then, on the memory that it uses now.

        `work` must have run before, so that nothing is set up any more. It may not wait for the GPU.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads may go on: NCCL's watchdog looks at events all the time.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


class WaitsForGpuError(Exception):
    """Some work cannot be captured: within it, the host waits for the GPU."""


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise WaitsForGpuError where torch would wait for the GPU meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that it does not know of all ways to wait
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
        raise WaitsForGpuError(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
