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
    group.barrier()
    assert group.last is not None
    assert (group.last.sequence, group.last.operation) == (3, "barrier")
