"""The shared-memory group with threads for ranks: quick, where tests/contract has processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from phalanx.collectives.join import join
from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.shared_memory import SharedMemoryGroup
from phalanx.errors import CollectiveMismatchError, DeadlineError, FrameError

_CPU = torch.device("cpu")


def _run(
    size: int, rank_program: Callable[[SharedMemoryGroup], object], timeout_s: float = 20.0
) -> list[Future[object]]:
    """What becomes of `rank_program(group)` on each of `size` ranks."""
    with open_rendezvous(
        "tp", "shm", tuple(range(size)), epoch=0, timeout_s=timeout_s, join_timeout_s=20.0
    ) as rendezvous:

        def run(rank: int) -> object:
            group = SharedMemoryGroup(rendezvous.spec, rank)
            try:
                return rank_program(group)
            finally:
                group.close()

        with ThreadPoolExecutor(size) as threads:
            return [threads.submit(run, rank) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("num_elements", [0, 7, 40_000, 150_000])
def test_sums_are_taken_in_rank_order_and_rounded_once(size: int, num_elements: int) -> None:
    addends = [
        torch.randn(num_elements, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
        for rank in range(size)
    ]
    expected = addends[0].float()
    for addend in addends[1:]:
        expected = expected + addend.float()
    for future in _run(size, lambda group: group.all_reduce(addends[group.rank].clone())):
        assert torch.equal(future.result(), expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_a_reduce_scatter_is_a_part_of_the_sum_to_the_last_bit(size: int, rows: int, dtype: torch.dtype) -> None:
    def program(group: SharedMemoryGroup) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(group.rank)
        x = (torch.randn(size * rows, 501, generator=generator) * 100).to(dtype)
        before = x.clone()
        part = group.reduce_scatter(x)
        assert torch.equal(x, before)
        return part, group.all_reduce(x)

    for rank, future in enumerate(_run(size, program)):
        part, whole = future.result()
        assert part.shape == (rows, 501)
        assert torch.equal(part, whole[rank * rows : (rank + 1) * rows])


_SLOT_ROWS = 512 * 1024 // 8


@pytest.mark.parametrize(
    "counts",
    [
        [[1, 2, 0], [0, 0, 3], [4, 0, 1]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[9, 0, 0], [0, 9, 0], [0, 0, 9]],
        [[0, 5, 0], [0, 5, 0], [0, 5, 0]],
        [[0, 0, 0], [7, 7, 7], [0, 0, 0]],
        [[0, _SLOT_ROWS, 0], [0, 0, _SLOT_ROWS - 1], [1, 0, 0]],
        [[0, _SLOT_ROWS, 1], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [3 * _SLOT_ROWS + 5, _SLOT_ROWS, 2 * _SLOT_ROWS - 5], [1, 1, 1]],
        [[2 * _SLOT_ROWS] * 3, [0, 1, 0], [_SLOT_ROWS // 2] * 3],
    ],
    ids=["some", "none", "own", "to one", "from one", "a slot", "more than a slot", "turns for one", "turns"],
)
def test_rows_arrive_where_they_belong_and_in_order(counts: list[list[int]]) -> None:
    def program(group: SharedMemoryGroup) -> torch.Tensor:
        x = torch.arange(sum(counts[group.rank])) + 10**9 * group.rank
        return group.all_to_all(x, counts[group.rank], [row[group.rank] for row in counts])

    for rank, future in enumerate(_run(3, program)):
        runs = [
            torch.arange(sum(row[:rank]), sum(row[: rank + 1])) + 10**9 * sender for sender, row in enumerate(counts)
        ]
        assert torch.equal(future.result(), torch.cat(runs))


def test_a_row_may_be_larger_than_a_slot_or_empty() -> None:
    def program(group: SharedMemoryGroup) -> list[tuple[tuple[int, ...], list[float]]]:
        found = []
        for width in (200_001, 0):
            x = torch.full((2, width, 2), float(group.rank), dtype=torch.bfloat16)
            x = group.all_to_all(x, [1, 1], [1, 1])
            found.append((tuple(x.shape), x.float().mean((1, 2)).nan_to_num(9.0).tolist()))
        return found

    for future in _run(2, program):
        assert future.result() == [((2, 200_001, 2), [0.0, 1.0]), ((2, 0, 2), [9.0, 9.0])]


def test_ranks_that_count_their_rows_differently_are_told_how() -> None:
    counts, expected = [[0, 3, 1], [2, 0, 0], [0, 0, 0]], [[0, 2, 0], [4, 0, 0], [1, 0, 0]]

    def program(group: SharedMemoryGroup) -> None:
        group.barrier()
        group.all_to_all(torch.ones(sum(counts[group.rank]), 8), counts[group.rank], expected[group.rank])
        group.barrier()

    exactly = (
        "at sequence 2 of group tp, epoch 0: in all_to_all float32 [8] rank 0 sends 3 rows to rank 1, which expects 4"
    )
    for future in _run(3, program):
        with pytest.raises(CollectiveMismatchError) as caught:
            future.result()
        assert str(caught.value) == exactly


def test_gather_and_broadcast() -> None:
    def program(group: SharedMemoryGroup) -> tuple[list[list[int]], list[int]]:
        gathered = group.all_gather(torch.full((2, 1), group.rank))
        return gathered.tolist(), group.broadcast(torch.tensor([group.rank, 5]), 2).tolist()

    for future in _run(3, program):
        assert future.result() == ([[0, 1, 2], [0, 1, 2]], [2, 5])


def test_ranks_in_different_collectives_are_told_what_each_is_in() -> None:
    def program(group: SharedMemoryGroup) -> None:
        group.barrier()
        group.all_reduce(torch.ones(2, 3 + group.rank))

    for future in _run(2, program):
        with pytest.raises(CollectiveMismatchError, match="sequence 2") as caught:
            future.result()
        assert "rank 0 is in all_reduce float32 [2, 3]; rank 1 is in all_reduce float32 [2, 4]" in str(caught.value)


def test_errors_name_global_ranks() -> None:
    with (
        open_rendezvous("tp", "shm", (2, 5), epoch=0, timeout_s=0.2, join_timeout_s=0.3) as rendezvous,
        pytest.raises(DeadlineError, match=r"waited 0\.3\d* s for the joining of group tp, epoch 0 from rank 2"),
    ):
        join(rendezvous.spec, 5, _CPU, None)
    with open_rendezvous("tp", "shm", (2, 5), epoch=0, timeout_s=0.2, join_timeout_s=20.0) as rendezvous:
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(lambda rank: SharedMemoryGroup(rendezvous.spec, rank), (2, 5))
            assert (first.rank, second.rank) == (0, 1)
            in_gather, in_barrier = threads.submit(first.all_gather, torch.ones(3)), threads.submit(second.barrier)
        for outcome in (in_gather, in_barrier):
            with pytest.raises(CollectiveMismatchError, match=r"rank 2 is in all_gather .*; rank 5 is in barrier"):
                outcome.result()
        first.close()
        second.close()
    with open_rendezvous("tp", "shm", (2, 5), epoch=0, timeout_s=0.2, join_timeout_s=20.0) as rendezvous:
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(lambda rank: SharedMemoryGroup(rendezvous.spec, rank), (2, 5))
        with pytest.raises(DeadlineError, match=r"barrier .* from rank 5 \(pid"):
            first.barrier()
        with pytest.raises(DeadlineError, match=r"from rank 5 .*, as rank 2 found while rank 5 was in barrier"):
            second.barrier()
            second.barrier()
        first.close()
        second.close()


def test_a_wait_ends_at_its_deadline() -> None:
    with open_rendezvous("tp", "shm", (0, 1), epoch=0, timeout_s=0.2, join_timeout_s=0.2) as rendezvous:
        with ThreadPoolExecutor(2) as threads:
            present, absent = threads.map(lambda rank: SharedMemoryGroup(rendezvous.spec, rank), range(2))
        with pytest.raises(DeadlineError, match=r"waited 0\.2\d* s for barrier .* from rank 1"):
            present.barrier()
        absent.barrier()  # its own turn is complete: rank 0 had come
        with pytest.raises(DeadlineError, match="as rank 0 found"):
            absent.barrier()
        present.close()
        absent.close()


def test_who_joins_after_the_deadline_is_told_how_long_it_waited_itself() -> None:
    with open_rendezvous("tp", "shm", (0, 1, 2), epoch=0, timeout_s=0.2, join_timeout_s=0.5) as rendezvous:
        for rank, missing in ((0, "from rank 1, rank 2"), (1, "from rank 2")):
            with pytest.raises(DeadlineError, match=missing) as caught:
                join(rendezvous.spec, rank, _CPU, None)
            assert (caught.value.waited_s >= 0.5) == (rank == 0)


def test_a_closed_group_says_so() -> None:
    def program(group: SharedMemoryGroup) -> None:
        group.barrier()
        group.close()
        group.all_reduce(torch.ones(3))

    for future in _run(2, program):
        with pytest.raises(CollectiveMismatchError, match="group tp, epoch 0 is closed"):
            future.result()


def test_more_shapes_than_are_remembered() -> None:
    def program(group: SharedMemoryGroup) -> bool:
        return all(group.all_reduce(torch.ones(n))[0].item() == 2.0 for n in range(1, 1100))

    assert [future.result() for future in _run(2, program)] == [True, True]


def test_a_closed_rendezvous_cannot_be_joined() -> None:
    with open_rendezvous("tp", "shm", (0, 1), epoch=0, timeout_s=0.2, join_timeout_s=0.2) as rendezvous:
        spec = rendezvous.spec
    with pytest.raises(FrameError):
        join(spec, 0, _CPU, None)


def test_a_world_of_one_waits_for_nobody() -> None:
    with open_rendezvous("tp", "single", (0,), epoch=0, timeout_s=0.2, join_timeout_s=0.2) as rendezvous:
        group = join(rendezvous.spec, 0, _CPU, None)
    x = torch.arange(3)
    assert group.all_reduce(x) is x
    gathered = group.all_gather(x)
    assert torch.equal(gathered, x)
    assert gathered.data_ptr() != x.data_ptr()
    x = torch.arange(6).view(3, 2)
    for result in (group.reduce_scatter(x), group.all_to_all(x, [3], [3])):
        assert torch.equal(result, x)
        assert result.data_ptr() != x.data_ptr()
    assert group.last is not None
    assert group.last.shape == (2,)
    group.barrier()
    assert group.last is not None
    assert (group.last.sequence, group.last.operation) == (5, "barrier")
