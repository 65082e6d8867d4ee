"""A GPU's memory that outlives processes, on a driver that is none: memfds stand for the pieces."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda import GRANULARITY, FakeCuda, bytes_at
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import DriverError, FrameError, PeerDiedError
from phalanx.memory import gpu_pieces
from phalanx.memory.arena import Arena
from phalanx.memory.cuda_driver import CudaDriver
from phalanx.memory.gpu_pieces import ALIGNMENT
from phalanx.memory.held import HeldMemory, decode_held, encode_held
from phalanx.memory.holder import Holder

GPU = torch.device("cuda", 0)
PIECE = 2 * GRANULARITY
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])


@pytest.fixture(autouse=True, scope="module")
def fake_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_pieces, "bytes_at", bytes_at)
        patch.setattr(gpu_pieces, "LARGEST_BYTES", PIECE)
        yield


@pytest.fixture
def holder() -> Iterator[Holder]:
    with Holder() as holder:
        yield holder


def arena(label: str = "test", held: HeldMemory | None = None, cuda: FakeCuda | None = None) -> Arena:
    return Arena(label, GPU, held, driver=CudaDriver(0, cuda or FakeCuda()))  # type: ignore[arg-type]


def num_pieces_open() -> int:
    """Descriptors of them in this process."""
    return sum("memfd:a piece" in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())


class Worker:
    """Another process, which has filled some memory and waits for its end."""

    def __init__(self, **values: int) -> None:
        told_read, told_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            memory = arena("memory of a worker")
            for name, value in values.items():
                memory.allocate(name, (20_000,), torch.int64).fill_(value)
            os.write(told_write, encode_held(memory.describe()))
            signal.pause()
            os._exit(0)
        os.close(told_write)
        self.told = decode_held(os.read(told_read, 1 << 16))
        os.close(told_read)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@given(st.lists(st.tuples(st.integers(1, 300_000), dtypes, st.booleans()), max_size=8), st.booleans())
def test_what_is_kept_is_there_and_nothing_lies_over_it(
    requests: list[tuple[int, torch.dtype, bool]], knows_size: bool
) -> None:
    """In another order, beside new tensors, and with writes of one seen by the other."""
    with arena("first") as first:
        if knows_size:
            first.begin_part(sum(count * dtype.itemsize for count, dtype, _ in requests))
        tensors = [
            first.allocate(f"t{i}", (count,), dtype).fill_(i + 1) for i, (count, dtype, _) in enumerate(requests)
        ]
        kept = {f"t{i}" for i, (_, _, is_kept) in enumerate(requests) if is_kept}
        with arena("second", decode_held(encode_held(first.describe(kept.__contains__)))) as second:
            assert second.held.keys() == kept
            for i, (count, dtype, is_kept) in reversed([*enumerate(requests)]):
                other = second.allocate(f"t{i}", (count,), dtype)
                assert other.data_ptr() % ALIGNMENT == 0
                if is_kept:
                    assert bool((other == i + 1).all())
                other.fill_(i + 2)
                assert bool((tensors[i] == (i + 2 if is_kept else i + 1)).all())


def test_a_tensor_begins_in_one_piece_and_ends_in_another() -> None:
    cuda = FakeCuda()
    with arena(cuda=cuda) as memory:
        memory.begin_part(100 + 3 * PIECE)
        memory.allocate("small", (100,), torch.uint8)
        large = memory.allocate("large", (3 * PIECE,), torch.uint8).fill_(7)
        assert bool((large == 7).all())
        assert memory.regions["large"].segment == 0
        sizes = [piece.size_bytes for piece in memory.describe().pieces]
        assert sizes == [PIECE] * 3 + [GRANULARITY] and cuda.created_bytes == sum(sizes)
        assert memory.describe(lambda name: name == "small").pieces == memory.describe().pieces[:1]
        assert not cuda.handles, "a piece that is mapped needs none"


def test_what_is_expected_is_taken_in_few_pieces_and_nothing_beyond() -> None:
    cuda = FakeCuda()
    with arena(cuda=cuda) as memory:
        memory.allocate("weight", (100,), torch.uint8)
        memory.begin_part(5 * 30_000)
        for i in range(5):
            memory.allocate(f"key.{i}", (30_000,), torch.uint8)  # aligned, they take a little more
        described = memory.describe(lambda name: name.startswith("key"))
        assert [piece.size_bytes for piece in described.pieces] == [PIECE, GRANULARITY]
        assert cuda.created_bytes == GRANULARITY + PIECE + GRANULARITY
        memory.allocate("one more", (GRANULARITY,), torch.uint8)
        assert cuda.created_bytes == PIECE + 3 * GRANULARITY, "what was not foreseen takes what it needs"


def test_who_takes_over_makes_nothing_new(holder: Holder) -> None:
    cuda = FakeCuda()
    with arena("first") as first:
        first.begin_part(1000)
        first.allocate("key", (1000,), torch.uint8).fill_(3)
        held = holder.hold(0, first.describe())
    with arena("second", held, cuda) as second:
        second.begin_part(1000)
        assert bool((second.allocate("key", (1000,), torch.uint8) == 3).all())
        assert cuda.created_bytes == 0 and second.describe() == held
        second.allocate("new", (1000,), torch.uint8).fill_(4)
        both = holder.hold(0, second.describe())
    with arena("third", both) as third:
        assert [int(third.allocate(name, (1000,), torch.uint8)[999]) for name in ("key", "new")] == [3, 4]


def test_memory_outlives_a_worker_that_is_killed(holder: Holder) -> None:
    worker = Worker(weight=7, key=8)
    held = holder.hold(0, worker.told)
    worker.kill()
    assert {piece.descriptor.pid for piece in held.pieces} == {os.getpid()}
    with arena("the next one", holder.memory(0)) as memory:
        assert [memory.allocate(name, (20_000,), torch.int64)[-1].item() for name in ("key", "weight")] == [8, 7]
        assert holder.hold(0, memory.describe()) == held, "what is held already stays as it is"
    assert "memory of a worker" not in Path("/proc/self/maps").read_text()


def test_more_pieces_than_go_into_a_message(holder: Holder) -> None:
    with arena("first", cuda=FakeCuda(total_bytes=1 << 26)) as first:
        for i in range(300):
            first.allocate(f"t{i}", (PIECE,), torch.uint8)[0] = i % 256
        assert len(holder.hold(0, first.describe()).pieces) == 300
    with arena("second", holder.memory(0), FakeCuda(total_bytes=1 << 26)) as second:
        assert [int(second.allocate(f"t{i}", (PIECE,), torch.uint8)[0]) for i in range(300)] == [
            i % 256 for i in range(300)
        ]


def test_who_was_too_late_changes_nothing(holder: Holder) -> None:
    first, second = Worker(weight=7), Worker(weight=8)
    held = holder.hold(0, first.told)
    before = num_pieces_open()
    for worker in (first, second):
        worker.kill()
    with pytest.raises(PeerDiedError, match="memory of a worker"):
        holder.hold(0, second.told)
    assert holder.memory(0) == held and num_pieces_open() == before


def test_what_was_let_go_of_cannot_be_had(holder: Holder) -> None:
    with arena() as memory:
        memory.allocate("t", (1,), torch.int64)
        told = memory.describe()
        held = holder.hold(0, told)
    assert num_pieces_open() == 1
    with pytest.raises(FrameError, match="its owner has closed it"):
        holder.hold(1, told)
    holder.drop(0)
    with pytest.raises(FrameError, match="its owner has closed it"):
        arena("late", held)
    assert num_pieces_open() == 0 and holder.memory(0) is None and holder.memory(1) is None


def test_tensors_keep_what_is_mapped_and_the_last_one_gives_it_back() -> None:
    cuda = FakeCuda()
    with arena(cuda=cuda) as memory:
        tensor = memory.allocate("t", (1000,), torch.int64)
    del memory
    gc.collect()
    tensor.fill_(5)
    view = tensor[10:20]
    del tensor
    gc.collect()
    assert cuda.mapped and bool((view == 5).all())
    del view
    gc.collect()
    assert not cuda.mapped and not cuda.reserved and cuda.num_waits == 1


def test_what_is_given_back_is_nobodys_and_comes_back_to_its_place(holder: Holder) -> None:
    """As of a KV cache, in a part of its own, beside weights."""
    cuda = FakeCuda()
    with arena("first", cuda=cuda) as first:
        weight = first.allocate("weight", (1000,), torch.uint8).fill_(7)
        first.begin_part(3 * PIECE)
        keys = [first.allocate(f"key.{i}", (PIECE,), torch.uint8).fill_(i + 1) for i in range(3)]
        whole = holder.hold(0, first.describe())
        mapped_bytes, names = sum(cuda.mapped.values()), [f"key.{i}" for i in range(3)]

        first.release(names[:1])
        first.release(names)
        assert sum(cuda.mapped.values()) == mapped_bytes - 3 * PIECE and cuda.num_waits == 2
        assert num_pieces_open() == 2 + 3, "descriptors of the holder, and of who has made them"
        assert holder.hold(0, first.describe()).pieces == whole.pieces[:1] and num_pieces_open() == 2
        assert set(first.describe().regions) == {"weight"} and bool((weight == 7).all())

        first.restore(names)
        first.restore(names)
        for i, key in enumerate(keys):
            assert bool((key == 0).all()), "other memory, where the tensor lies"
            key.fill_(i + 11)
        held = holder.hold(0, first.describe())
        assert held.pieces[0] == whole.pieces[0] and not set(held.pieces[1:]) & set(whole.pieces)
        assert held.regions == whole.regions and not cuda.handles
    with arena("second", held) as second:
        values = [int(second.allocate(name, (PIECE,), torch.uint8)[-1]) for name in names]
        assert values == [11, 12, 13] and bool((second.allocate("weight", (1000,), torch.uint8) == 7).all())
        second.release(names)
        assert num_pieces_open() == 4, "what others hold stays theirs"
        assert bool((keys[0] == 11).all())


def test_a_piece_is_given_back_when_nothing_in_it_is_in_use() -> None:
    cuda = FakeCuda()
    with arena(cuda=cuda) as memory:
        memory.begin_part(2 * PIECE)
        for name, size_bytes in (("small", 100), ("across", PIECE), ("last", 100)):
            memory.allocate(name, (size_bytes,), torch.uint8).fill_(1)
        memory.release(["across"])
        assert len(cuda.mapped) == 2 and set(memory.describe().regions) == {"small", "across", "last"}
        memory.release(["small"])
        assert len(cuda.mapped) == 1 and set(memory.describe().regions) == {"last"}
        memory.restore(["across"])
        assert len(cuda.mapped) == 2 and set(memory.describe().regions) == {"small", "across", "last"}


def test_without_room_nothing_comes_back() -> None:
    cuda = FakeCuda()
    with arena(cuda=cuda) as memory:
        memory.begin_part(3 * PIECE)
        tensors = [memory.allocate(name, (PIECE,), torch.uint8) for name in "abc"]
        memory.release("abc")
        cuda.total_bytes = cuda.created_bytes + 2 * PIECE
        with pytest.raises(torch.OutOfMemoryError):
            memory.restore("abc")
        assert not cuda.mapped and not cuda.handles and not memory.describe().regions and num_pieces_open() == 0
        cuda.total_bytes += 3 * PIECE
        memory.restore("abc")
        assert [int(tensor.fill_(5)[-1]) for tensor in tensors] == [5, 5, 5]
    del memory, tensors
    gc.collect()
    assert not cuda.mapped and not cuda.reserved


def test_no_room_is_an_error_of_torch() -> None:
    with arena(cuda=FakeCuda(total_bytes=PIECE)) as memory:
        memory.allocate("fits", (1000,), torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match=r"cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY: in other words"):
            memory.allocate("does not", (2 * PIECE,), torch.uint8)


def test_a_piece_of_another_size_is_refused(holder: Holder) -> None:
    with arena() as memory:
        memory.allocate("t", (1,), torch.int64)
        told = memory.describe()
        wrong = HeldMemory(
            (), told.regions, tuple(piece.__class__(piece.descriptor, PIECE * 2, 1) for piece in told.pieces)
        )
        cuda = FakeCuda()
        before = num_pieces_open()
        with pytest.raises(DriverError, match=r"cuMemMap: CUDA_ERROR_INVALID_VALUE"):
            arena("second", wrong, cuda)
        gc.collect()
        assert num_pieces_open() == before and not cuda.handles and not cuda.reserved


@pytest.mark.parametrize(("attributes", "can_share"), [((102, 103), True), ((102,), False), ((), False)])
def test_whether_a_driver_can_share(attributes: tuple[int, ...], can_share: bool) -> None:
    driver = CudaDriver(0, FakeCuda(attributes=attributes))  # type: ignore[arg-type]
    assert driver.can_share == can_share


def test_a_driver_that_lacks_a_function_says_which() -> None:
    with pytest.raises(DriverError, match="cuInit: no such function: the driver is too old"):
        CudaDriver(0, object())  # type: ignore[arg-type]
