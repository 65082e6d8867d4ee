"""Arena memory: right shapes and types, no overlap, shared, and nameless."""

from __future__ import annotations

import os
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_memory_names import new_names

from phalanx.memory.arena import ALIGNMENT, SEGMENT_BYTES, Arena

shapes = st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@given(st.lists(st.tuples(shapes, dtypes), max_size=12))
def test_tensors_do_not_overlap(requests: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    arena = Arena("test", torch.device("cpu"))
    tensors = [arena.allocate(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(requests)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, requests, strict=True)):
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert bool((tensor == i + 1).all())


def test_a_tensor_larger_than_a_segment() -> None:
    arena = Arena("test", torch.device("cpu"))
    small = arena.allocate("small", (4,), torch.float32)
    large = arena.allocate("large", (SEGMENT_BYTES + 1,), torch.uint8)
    large[-1] = 7
    assert large[-1] == 7
    assert arena.regions["large"].segment != arena.regions["small"].segment
    assert small.numel() == 4


def test_small_tensors_share_a_segment_whatever_comes_between() -> None:
    arena = Arena("test", torch.device("cpu"))
    for i in range(5):
        arena.allocate(f"small{i}", (100,), torch.float32)
        arena.allocate(f"large{i}", (SEGMENT_BYTES + 1,), torch.uint8)
    assert len({arena.regions[f"small{i}"].segment for i in range(5)}) == 1
    assert len({region.segment for region in arena.regions.values()}) == 6


def test_a_forked_process_writes_into_the_same_memory() -> None:
    tensor = Arena("test", torch.device("cpu")).allocate("t", (2,), torch.int64)
    tensor.zero_()
    pid = os.fork()
    if pid == 0:
        tensor[1] = 42
        os._exit(0)
    os.waitpid(pid, 0)
    assert tensor.tolist() == [0, 42]


def test_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    arena = Arena("test", torch.device("cpu"))
    tensor = arena.allocate("t", (1 << 16,), torch.float32)
    assert not new_names(before)
    del arena
    tensor.fill_(1.0)  # the tensor itself keeps its memory


def test_a_name_is_given_once() -> None:
    arena = Arena("test", torch.device("cpu"))
    arena.allocate("t", (1,), torch.float32)
    with pytest.raises(AssertionError, match="twice"):
        arena.allocate("t", (1,), torch.float32)


@given(st.lists(st.tuples(st.integers(0, 9000), st.booleans()), max_size=12))
def test_releasing_some_leaves_the_others(requests: list[tuple[int, bool]]) -> None:
    arena = Arena("test", torch.device("cpu"))
    tensors = [arena.allocate(f"t{i}", (size,), torch.uint8).fill_(i + 1) for i, (size, _) in enumerate(requests)]
    arena.release([f"t{i}" for i, (_, is_released) in enumerate(requests) if is_released])
    for i, (tensor, (_, is_released)) in enumerate(zip(tensors, requests, strict=True)):
        assert is_released or bool((tensor == i + 1).all())
        tensor.fill_(i + 1)
        assert bool((tensor == i + 1).all())


def test_released_memory_goes_back_to_the_system() -> None:
    arena = Arena("release", torch.device("cpu"))
    sizes = [100_000, 50, 300_000, 70_001, 4 << 20]
    for i, size in enumerate(sizes):
        arena.allocate(f"t{i}", (size,), torch.uint8).fill_(1)
    before = resident_bytes("phalanx-release")
    assert before >= sum(sizes)
    arena.release(["t1", "t3", "t2"])  # adjacent: pages that they share go too
    freed = before - resident_bytes("phalanx-release")
    assert sum(sizes[1:4]) - 2 * PAGESIZE < freed <= sum(sizes[1:4])
    arena.release(["t4"])
    assert before - resident_bytes("phalanx-release") - freed > sizes[4] - 2 * PAGESIZE


def resident_bytes(name: str) -> int:
    """Of the mappings of a memfd in this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    mine = [next(line for line in lines if line.startswith("Rss:")) for line in lines if f"/memfd:{name}" in line]
    return sum(int(line.split()[1]) * 1024 for line in mine)
