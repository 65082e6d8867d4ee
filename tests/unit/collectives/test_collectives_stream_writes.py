"""Which word a GPU is told to write, in which stream, and that its refusal is no secret."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phalanx.collectives.stream_writes import StreamWrites

DEVICE = torch.device("cuda", 1)
MAPPED_AT, STREAM = 1 << 40, 77


class Driver:
    """CUDA's, with the memory mapped at some address."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int, int]] = []
        self.refuses_with = 0
        self.cuStreamWriteValue64_v2 = self.Write(self)

    class Write:
        argtypes: Any = None

        def __init__(self, driver: Driver) -> None:
            self._driver = driver

        def __call__(self, stream: int, address: int, number: int, flags: int) -> int:
            self._driver.written.append((stream, address, number, flags))
            return self._driver.refuses_with

    def cuMemHostRegister_v2(self, host: Any, size: Any, flags: int) -> int:
        return 0

    def cuMemHostGetDevicePointer_v2(self, address: Any, host: Any, flags: int) -> int:
        address._obj.value = MAPPED_AT
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", {1: STREAM}.__getitem__, raising=False)
    return driver


def test_each_function_is_of_a_word_and_of_the_stream_that_is_current_when_it_is_called(driver: Driver) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as view:
        writes = StreamWrites(view, DEVICE)
        begun, finished = writes.to(128), writes.to(136)
        begun(5)
        finished(5)
        begun(6)
        del writes, begun, finished
    assert driver.written == [(STREAM, MAPPED_AT + at, number, 0) for at, number in ((128, 5), (136, 5), (128, 6))]


def test_what_the_driver_refuses_is_an_error(driver: Driver) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as view:
        begun = StreamWrites(view, DEVICE).to(128)
        driver.refuses_with = 700
        with pytest.raises(RuntimeError, match="cuStreamWriteValue64 failed with CUDA error 700"):
            begun(5)
        del begun
