"""Arena memory: right shapes and types, no overlap, shared, and nameless."""

from __future__ import annotations

import os
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_memory_names import new_names

from phalanx.errors import FrameError
from phalanx.memory.arena import Arena
from phalanx.memory.held import HeldMemory, decode_held, encode_held
from phalanx.memory.host_segments import ALIGNMENT, SEGMENT_BYTES

CPU = torch.device("cpu")
shapes = st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena("test", CPU) as arena:
        yield arena


@given(st.lists(st.tuples(shapes, dtypes), max_size=12))
def test_tensors_do_not_overlap(requests: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    with Arena("test", CPU) as arena:
        tensors = [arena.allocate(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(requests)]
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, requests, strict=True)):
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert bool((tensor == i + 1).all())


def test_a_tensor_larger_than_a_segment(arena: Arena) -> None:
    small = arena.allocate("small", (4,), torch.float32)
    large = arena.allocate("large", (SEGMENT_BYTES + 1,), torch.uint8)
    large[-1] = 7
    assert large[-1] == 7
    assert arena.regions["large"].segment != arena.regions["small"].segment
    assert small.numel() == 4


def test_small_tensors_share_a_segment_whatever_comes_between(arena: Arena) -> None:
    for i in range(5):
        arena.allocate(f"small{i}", (100,), torch.float32)
        arena.allocate(f"large{i}", (SEGMENT_BYTES + 1,), torch.uint8)
    assert len({arena.regions[f"small{i}"].segment for i in range(5)}) == 1
    assert len({region.segment for region in arena.regions.values()}) == 6


def test_a_forked_process_writes_into_the_same_memory(arena: Arena) -> None:
    tensor = arena.allocate("t", (2,), torch.int64)
    tensor.zero_()
    pid = os.fork()
    if pid == 0:
        tensor[1] = 42
        os._exit(0)
    os.waitpid(pid, 0)
    assert tensor.tolist() == [0, 42]


def test_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    with Arena("test", CPU) as arena:
        tensor = arena.allocate("t", (1 << 16,), torch.float32)
        assert not new_names(before)
    del arena
    tensor.fill_(1.0)  # the tensor itself keeps its memory


def test_a_name_is_given_once(arena: Arena) -> None:
    arena.allocate("t", (1,), torch.float32)
    with pytest.raises(AssertionError, match="twice"):
        arena.allocate("t", (1,), torch.float32)


@given(st.lists(st.tuples(st.integers(0, 9000), st.booleans()), max_size=12))
def test_releasing_some_leaves_the_others(requests: list[tuple[int, bool]]) -> None:
    with Arena("test", CPU) as arena:
        tensors = [arena.allocate(f"t{i}", (size,), torch.uint8).fill_(i + 1) for i, (size, _) in enumerate(requests)]
        arena.release([f"t{i}" for i, (_, is_released) in enumerate(requests) if is_released])
    for i, (tensor, (_, is_released)) in enumerate(zip(tensors, requests, strict=True)):
        assert is_released or bool((tensor == i + 1).all())
        tensor.fill_(i + 1)
        assert bool((tensor == i + 1).all())


def test_released_memory_goes_back_to_the_system() -> None:
    with Arena("release", CPU) as arena:
        sizes = [100_000, 50, 300_000, 70_001, 4 << 20]
        for i, size in enumerate(sizes):
            arena.allocate(f"t{i}", (size,), torch.uint8).fill_(1)
        before = resident_bytes("phalanx:release")
        assert before >= sum(sizes)
        arena.release(["t1", "t3", "t2"])  # adjacent: pages that they share go too
        freed = before - resident_bytes("phalanx:release")
        assert sum(sizes[1:4]) - 2 * PAGESIZE < freed <= sum(sizes[1:4])
        arena.release(["t4"])
        assert before - resident_bytes("phalanx:release") - freed > sizes[4] - 2 * PAGESIZE


@given(st.lists(st.tuples(shapes, dtypes, st.booleans()), max_size=12))
def test_an_arena_of_held_memory_has_what_was_kept(
    requests: list[tuple[tuple[int, ...], torch.dtype, bool]],
) -> None:
    """In another order, beside new tensors, and with writes of one seen by the other."""
    with Arena("first", CPU) as first:
        tensors = [first.allocate(f"t{i}", shape, dtype).fill_(i + 1) for i, (shape, dtype, _) in enumerate(requests)]
        kept = {f"t{i}" for i, (_, _, is_kept) in enumerate(requests) if is_kept}
        with Arena("second", CPU, decode_held(encode_held(first.describe(kept.__contains__)))) as second:
            assert second.held.keys() == kept
            others = {
                i: second.allocate(f"t{i}", shape, dtype) for i, (shape, dtype, _) in reversed([*enumerate(requests)])
            }
            for i, other in others.items():
                if f"t{i}" not in kept:
                    other.fill_(i + 1)
                assert bool((other == i + 1).all()), "as it was, and nothing lies over it"
                other.fill_(i + 2)
                assert bool((tensors[i] == (i + 2 if f"t{i}" in kept else i + 1)).all())


def test_what_is_held_is_described_where_it_is(arena: Arena) -> None:
    """So that it can be told from what is new: a third worker takes over from the first."""
    arena.allocate("t", (3,), torch.int64)
    first = arena.describe()
    with Arena("second", CPU, first) as second:
        second.allocate("t", (3,), torch.int64)
        assert second.describe() == first
        second.allocate("new", (3,), torch.int64)
        assert [segment.label for segment in second.describe().segments] == ["test", "second"]


def test_parts_share_no_segment(arena: Arena) -> None:
    arena.allocate("weight", (3,), torch.int64)
    arena.begin_part()
    cache = arena.allocate("key.0", (3,), torch.int64).fill_(7)
    described = arena.describe(lambda name: name == "key.0")
    assert len(described.segments) == 1 and described.regions.keys() == {"key.0"}
    with Arena("second", CPU, described) as second:
        assert torch.equal(second.allocate("key.0", (3,), torch.int64), cache)


def test_a_tensor_of_another_size_is_not_taken_over(arena: Arena) -> None:
    arena.allocate("key.0", (3,), torch.int64)
    with Arena("second", CPU, arena.describe()) as second, pytest.raises(AssertionError, match="24 bytes are held"):
        second.allocate("key.0", (4,), torch.int64)


def test_descriptors_are_given_back_even_if_one_segment_is_gone(arena: Arena) -> None:
    arena.allocate("t", (3,), torch.int64)
    described = arena.describe()
    gone = msgspec.structs.replace(described.segments[0], nonce=1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FrameError):
        Arena("second", CPU, HeldMemory(segments=(*described.segments, gone), regions={}))
    assert len(os.listdir("/proc/self/fd")) == before


def resident_bytes(name: str) -> int:
    """Of the mappings of a memfd in this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    mine = [next(line for line in lines if line.startswith("Rss:")) for line in lines if f"/memfd:{name}" in line]
    return sum(int(line.split()[1]) * 1024 for line in mine)


@given(st.lists(st.tuples(shapes, dtypes, st.booleans()), max_size=12))
def test_who_is_about_to_write_has_memory_of_its_own(
    requests: list[tuple[tuple[int, ...], torch.dtype, bool]],
) -> None:
    with Arena("first", CPU) as first:
        tensors = [first.allocate(f"t{i}", shape, dtype).fill_(i + 1) for i, (shape, dtype, _) in enumerate(requests)]
        with Arena("second", CPU, first.describe()) as second:
            others = [second.allocate(f"t{i}", shape, dtype) for i, (shape, dtype, _) in enumerate(requests)]
            second.detach([f"t{i}" for i, (_, _, is_written) in enumerate(requests) if is_written])
            for i, (other, (_, _, is_written)) in enumerate(zip(others, requests, strict=True)):
                if is_written:
                    other.fill_(100)
                assert bool((other == (100 if is_written else i + 1)).all())
            for i, tensor in enumerate(tensors):
                assert bool((tensor == i + 1).all())


def test_a_part_has_only_the_segments_that_it_lies_in(arena: Arena) -> None:
    for name in ("weight", "key"):
        arena.begin_part()
        arena.allocate(name, (10,), torch.uint8)
    held = msgspec.structs.replace(arena.describe(), cache=frozenset({"key"}))
    part = decode_held(encode_held(held)).part(lambda name: name not in held.cache)
    assert part == arena.describe("weight".__eq__) and len(part.segments) == 1 and not part.cache
    assert held.part("key".__eq__).cache == {"key"}
