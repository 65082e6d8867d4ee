"""Arena memory: right shapes and types, no overlap, shared, and nameless."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    before = os.listdir("/dev/shm")
    arena = Arena("test", torch.device("cpu"))
    tensor = arena.allocate("t", (1 << 16,), torch.float32)
    assert os.listdir("/dev/shm") == before
    del arena
    tensor.fill_(1.0)  # the tensor itself keeps its memory


def test_a_name_is_given_once() -> None:
    arena = Arena("test", torch.device("cpu"))
    arena.allocate("t", (1,), torch.float32)
    with pytest.raises(AssertionError, match="twice"):
        arena.allocate("t", (1,), torch.float32)
