"""Threads as ranks do what ranks do."""

from __future__ import annotations

import threading

import pytest
import torch

from phalanx.collectives.group import Group
from phalanx.errors import CollectiveMismatchError
from phalanx.testing.thread_group import ThreadGroup, run_ranks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collectives(size: int) -> None:
    def body(group: Group) -> None:
        x = torch.full((2, 3), float(group.rank + 1))
        summed = group.all_reduce(x)
        assert summed is x and (x == sum(range(1, size + 1))).all()
        gathered = group.all_gather(torch.full((2, 1), group.rank))
        assert gathered.tolist() == [list(range(size))] * 2
        assert group.all_gather(torch.tensor([group.rank]), dim=0).tolist() == list(range(size))
        assert group.broadcast(torch.tensor([group.rank]), src=size - 1).tolist() == [size - 1]
        assert group.all_reduce(torch.tensor([group.rank == 0])).tolist() == [True]
        group.barrier()
        assert group.last is not None and (group.last.operation, group.last.sequence) == ("barrier", 6)

    run_ranks(size, body)


def test_different_shapes_are_a_mismatch() -> None:
    with pytest.raises(
        CollectiveMismatchError, match=r"all_reduce float32 \[1\].*all_reduce float32 \[2\]|\[2\].*\[1\]"
    ):
        run_ranks(2, lambda group: group.all_reduce(torch.zeros(group.rank + 1)))


def test_the_failure_of_one_rank_ends_the_others_wait() -> None:
    def body(group: Group) -> None:
        if group.rank == 1:
            raise RuntimeError("rank 1 failed")
        group.barrier()

    with pytest.raises(RuntimeError, match="rank 1 failed"):
        run_ranks(3, body)


def test_a_wait_has_an_end() -> None:
    first, _ = ThreadGroup.make(2, timeout_s=0.01)
    with pytest.raises(threading.BrokenBarrierError):
        first.barrier()
