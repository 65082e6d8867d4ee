"""Weights that ranks of several engines compute with: nothing that a step does may write to them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import models_paged as paged
import pytest
import torch
from test_models_packed_memory import FAMILIES, Arenas, last_logits

from phalanx.memory.arena import Arena
from phalanx.memory.host_segments import HostSegments
from phalanx.models.packed import can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.float32, paged.CPU), reason="torch was built without oneDNN")


@pytest.fixture
def arenas() -> Iterator[Arenas]:
    with Arenas() as arenas:
        yield arenas


def forbid_writing(arena: Arena) -> None:
    """Who writes to what it has is killed by SIGSEGV."""
    backing = arena._backing
    assert isinstance(backing, HostSegments)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for segment in backing._segments:
        mapping = segment._mapping
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert not libc.mprotect(address, len(mapping), mmap.PROT_READ)


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, paged.CPU)])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_write_to_no_weights(written: Any, arenas: Arenas, family: str, dtype: torch.dtype) -> None:
    path = written(family)
    expected = last_logits(arenas.load(path, dtype))
    taken_over = arenas.load(path, dtype)
    assert arenas.last is not None
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            forbid_writing(arenas.last)
            code = int(not torch.equal(last_logits(taken_over), expected))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
