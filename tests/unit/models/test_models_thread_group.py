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
        part = group.reduce_scatter(torch.arange(2 * size).view(2 * size, 1))
        assert part.tolist() == [[2 * group.rank * size], [(2 * group.rank + 1) * size]]
        group.barrier()
        assert group.last is not None and (group.last.operation, group.last.sequence) == ("barrier", 7)

    run_ranks(size, body)


def test_rows_go_where_they_are_sent() -> None:
    counts = [[1, 2, 0], [0, 0, 3], [0, 0, 0]]

    def body(group: Group) -> None:
        sent, received = counts[group.rank], [row[group.rank] for row in counts]
        x = torch.arange(3 * sum(sent)).view(-1, 3) + 100 * group.rank
        rows = group.all_to_all(x, sent, received)
        expected = [[[0, 1, 2]], [[3, 4, 5], [6, 7, 8]], [[100, 101, 102], [103, 104, 105], [106, 107, 108]]]
        assert rows.tolist() == expected[group.rank]
        assert group.last is not None and group.last.shape == (3,)

    run_ranks(3, body)


def test_ranks_that_count_their_rows_differently_are_told_how() -> None:
    def body(group: Group) -> None:
        send, receive = ([0, 2], [0, 0]) if group.rank == 0 else ([0, 0], [1, 0])
        group.all_to_all(torch.zeros(sum(send)), send, receive)

    with pytest.raises(CollectiveMismatchError, match="rank 0 sends 2 rows to rank 1, which expects 1"):
        run_ranks(2, body)


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
