"""What every process group must do, whatever carries its data: single, shared memory, Gloo, NCCL, between hosts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from collectives_crew import Crew
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared_memory_names import new_names
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.collectives.spec import GroupSpec

pytestmark = pytest.mark.slow

_WORLDS = [
    *(("single", 1), ("shm", 2), ("shm", 3), ("shm", 4), ("gloo", 2), ("gloo", 3), ("nccl", 2), ("nccl", 4)),
    *(("spanning", 2), ("spanning", 3), ("spanning", 4), ("spanning-nccl", 2), ("spanning-nccl", 4)),
]
_DTYPES = ["float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
_OPERATIONS = ["all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all"]
_EXACT = ("single", "shm", "spanning")


@pytest.fixture(scope="module", params=_WORLDS, ids=lambda world: f"{world[0]}-{world[1]}")
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    backend, size = request.param
    if backend.endswith("nccl") and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    with Crew(backend, size) as crew:
        for outcome in crew.joining.values():
            assert outcome.error is None, outcome.error
        yield crew


class Step(NamedTuple):
    """One collective of a program that every rank runs. Rank r's input is made from (seed, r).

    A rank brings `shape`, that for every rank to a reduce_scatter, and up to so many rows for each to an all_to_all.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    dim: int = 0
    src: int = 0
    seed: int = 0
    transposed: bool = False


def run_program(group: Group, steps: list[Step], tolerant: bool) -> list[str]:
    """Run and check against plain torch; returns a digest of each result that must be the same on all ranks."""
    return [_run(group, step, tolerant) for step in steps]


def _check_rounded(result: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """A sum whose partial sums, in any order, were rounded: each by half a unit in the last place at most."""
    exact = torch.stack(inputs).double()
    half_unit = torch.finfo(result.dtype).eps / 2
    allowed = len(inputs) * half_unit * (1 + half_unit) ** len(inputs) * exact.abs().sum(0)
    assert ((result.double() - exact.sum(0)).abs() <= allowed).all()


def _run(group: Group, step: Step, tolerant: bool) -> str:
    if step.operation == "barrier":
        group.barrier()
        return ""
    src = step.src % group.size
    inputs = _inputs(step, group.size)
    shape = inputs[group.rank].shape
    x = inputs[group.rank].clone(memory_format=torch.preserve_format).to(_device(group))
    if step.operation == "all_reduce":
        result, expected = group.all_reduce(x), _sum(inputs)
        assert result is x
    elif step.operation == "broadcast":
        result, expected = group.broadcast(x, src), inputs[src]
        assert result is x
    else:
        if step.operation == "all_gather":
            result, expected = group.all_gather(x, step.dim), torch.cat(inputs, step.dim)
        elif step.operation == "reduce_scatter":
            inputs = [x.tensor_split(group.size)[group.rank] for x in inputs]
            result, expected = group.reduce_scatter(x), _sum(inputs)
        else:
            shape = shape[1:]
            result, expected = _exchange(group, step, x), _received(step, inputs, group.rank)
        assert torch.equal(x.cpu(), _inputs(step, group.size)[group.rank]), "it must stay as it is"
        if result.numel():
            assert result.data_ptr() != x.data_ptr()
    assert group.last is not None
    assert (group.last.operation, group.last.dtype, group.last.shape) == (step.operation, step.dtype, tuple(shape))
    result = result.cpu()
    assert result.shape == expected.shape
    if tolerant and step.operation in ("all_reduce", "reduce_scatter") and expected.is_floating_point():
        _check_rounded(result, inputs)
    else:
        assert torch.equal(result, expected), step
    if step.operation in ("reduce_scatter", "all_to_all"):
        return ""
    return sha256(result.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _device(group: Group) -> torch.device:
    return torch.device("cuda", group.rank) if type(group).__name__ == "NcclGroup" else torch.device("cpu")


def _inputs(step: Step, size: int) -> list[Tensor]:
    if step.operation == "all_to_all":
        return [_input(step, rank, sum(send_counts)) for rank, send_counts in enumerate(_counts(step, size))]
    num_rows = step.shape[0] * size if step.operation == "reduce_scatter" else None
    return [_input(step, rank, num_rows) for rank in range(size)]


def _input(step: Step, rank: int, num_rows: int | None) -> Tensor:
    """`num_rows`: if they are not as many as the step's shape has."""
    shape = list(step.shape)
    if num_rows is not None:
        shape[0] = num_rows
    is_transposed = step.transposed and len(shape) > 1
    if is_transposed:
        shape[0], shape[-1] = shape[-1], shape[0]
    generator = torch.Generator().manual_seed(step.seed * 64 + rank)
    x = (torch.randn(shape, generator=generator) * 8).to(getattr(torch, step.dtype))
    return x.transpose(0, -1) if is_transposed else x


def _counts(step: Step, size: int) -> list[list[int]]:
    """How many rows each rank sends to each, as routing may have it."""
    rng = random.Random(step.seed)
    most = step.shape[0]
    some = [[rng.randint(0, most) for _ in range(size)] for _ in range(size)]
    one = rng.randrange(size)
    match rng.choice(["any", "any", "equal", "to one", "from one", "none"]):
        case "any":
            return some
        case "equal":
            return [[most] * size] * size
        case "to one":
            return [[number if rank == one else 0 for rank, number in enumerate(row)] for row in some]
        case "from one":
            return [row if rank == one else [0] * size for rank, row in enumerate(some)]
    return [[0] * size] * size


def _exchange(group: Group, step: Step, x: Tensor) -> Tensor:
    counts = _counts(step, group.size)
    return group.all_to_all(x, counts[group.rank], [row[group.rank] for row in counts])


def _received(step: Step, inputs: list[Tensor], rank: int) -> Tensor:
    counts = _counts(step, len(inputs))
    return torch.cat([torch.split(x, row)[rank] for x, row in zip(inputs, counts, strict=True)])


def _sum(inputs: list[Tensor]) -> Tensor:
    dtype = inputs[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    return reduce(torch.add, (x.to(wide) for x in inputs)).to(dtype)


_shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def _with_dim(step: Step) -> st.SearchStrategy[Step]:
    if step.shape:
        return st.integers(-len(step.shape), len(step.shape) - 1).map(lambda dim: step._replace(dim=dim))
    # A tensor without a dimension cannot be concatenated or divided.
    fits = step.operation in ("all_reduce", "broadcast", "barrier")
    return st.just(step if fits else step._replace(operation="broadcast"))


_steps = st.builds(
    Step,
    operation=st.sampled_from([*_OPERATIONS, "barrier"]),
    dtype=st.sampled_from(_DTYPES),
    shape=_shapes | st.tuples(st.integers(1, 40), st.sampled_from([64, 576, 4096])),
    src=st.integers(0, 3),
    seed=st.integers(0, 2**20),
    transposed=st.booleans(),
).flatmap(_with_dim)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(_steps, min_size=1, max_size=12))
def test_any_sequence_of_collectives_equals_plain_torch(crew: Crew, program: list[Step]) -> None:
    digests = crew.run(run_program, program, crew.backend not in _EXACT)
    assert all(theirs == digests[0] for theirs in digests), "ranks differ in a bit"


@pytest.mark.parametrize("dtype", _DTYPES)
def test_every_dtype_with_sizes_around_parts_slots_and_chunks(crew: Crew, dtype: str) -> None:
    itemsize = getattr(torch, dtype).itemsize
    limits = (0, 1, 64 * crew.size, 256 * 1024 // itemsize, 512 * 1024 // itemsize)
    sizes = sorted({max(0, limit + delta) for limit in limits for delta in (-1, 0, 1)} | {1_300_000 // itemsize})
    program = [Step(operation, dtype, (size,), seed=size) for size in sizes for operation in _OPERATIONS]
    crew.run(run_program, program, crew.backend not in _EXACT)


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_large_tensors_that_are_not_contiguous(crew: Crew, operation: str) -> None:
    step = Step(operation, "float32", (700, 600), dim=1, src=1, seed=7, transposed=True)
    crew.run(run_program, [step], crew.backend not in _EXACT)


def in_and_out_of_inference_mode(group: Group) -> list[float]:
    values = []
    for inference in (True, False, True):
        for shape in ((3, 5), (200, 999)):
            with torch.inference_mode(inference):
                x = torch.ones(shape, device=_device(group))
                values.append(group.all_reduce(x)[0, 0].item())
                values.append(group.all_gather(x, 0).sum().item() / x.sum().item())
                values.append(group.reduce_scatter(x.repeat(group.size, 1)).sum().item() / x.sum().item())
                counts = [len(x)] * group.size
                values.append(group.all_to_all(x.repeat(group.size, 1), counts, counts).sum().item() / x.sum().item())
    return values


def test_inference_mode_may_change(crew: Crew) -> None:
    for values in crew.run(in_and_out_of_inference_mode):
        assert values == [float(crew.size)] * 24


def record_after_two(group: Group) -> tuple[Any, ...]:
    before = 0 if group.last is None else group.last.sequence
    group.barrier()
    group.all_reduce(torch.zeros(2, 3, dtype=torch.bfloat16, device=_device(group)))
    last = group.last
    assert last is not None
    return last.group, last.epoch, last.sequence - before, last.operation, last.dtype, tuple(last.shape)


def test_the_last_collective_is_on_record(crew: Crew) -> None:
    expected = ("tp", 3, 2, "all_reduce", "bfloat16", (2, 3))
    assert crew.run(record_after_two) == [expected] * crew.size


def rows_on_record(group: Group, num_rows: int) -> tuple[Any, ...]:
    """Of two all_to_all: one of `num_rows` rows to the next rank and one of none."""
    records = []
    for number in (num_rows, 0):
        send = [number if rank == (group.rank + 1) % group.size else 0 for rank in range(group.size)]
        receive = [number if rank == (group.rank - 1) % group.size else 0 for rank in range(group.size)]
        group.all_to_all(torch.zeros(number, 3, 5, dtype=torch.int32, device=_device(group)), send, receive)
        assert group.last is not None
        records.append((group.last.operation, group.last.dtype, tuple(group.last.shape)))
    return tuple(records)


def test_the_record_of_an_all_to_all_does_not_depend_on_the_rows(crew: Crew) -> None:
    assert crew.run(rows_on_record, 7) == [(("all_to_all", "int32", (3, 5)),) * 2] * crew.size


def identity(group: Group) -> tuple[str, int, int]:
    return group.name, group.rank, group.size


def test_a_group_knows_its_name_rank_and_size(crew: Crew) -> None:
    assert crew.run(identity) == [("tp", rank, crew.size) for rank in range(crew.size)]


def test_a_spec_travels_as_msgpack(crew: Crew) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(crew.spec), type=GroupSpec) == crew.spec


def close_and_count(group: Group) -> tuple[int, int, list[str]]:
    before = len(os.listdir("/proc/self/fd"))
    group.close()
    group.close()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]
    return before, len(os.listdir("/proc/self/fd")), mapped


@pytest.mark.parametrize("backend", ["shm", "gloo", "spanning"])
def test_nothing_is_left_after_closing(backend: str) -> None:
    before = set(os.listdir("/dev/shm"))
    with Crew(backend, 3) as crew:
        crew.run(run_program, [Step("all_reduce", "float32", (300_000,)), Step("all_to_all", "float32", (5,))], True)
        assert not new_names(before)
        for before, after, mapped in crew.run(close_and_count):
            assert after < before
            assert not mapped
