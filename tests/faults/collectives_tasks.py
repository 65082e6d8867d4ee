"""What the ranks of a crew are told to do. Functions that a process can be sent: each is called with its group."""

from __future__ import annotations

import os
import time

import torch

from phalanx.collectives.group import Group

OURS = "all_reduce float32 [2, 576]"
"""What errors call `all_reduce` without arguments."""
SHARING = ["all_reduce", "reduce_scatter", "all_to_all"]
"""What `work_for_ever` can do: each has its own way of sharing out the work."""


def all_reduce(group: Group, dtype: str = "float32", shape: tuple[int, ...] = (2, 576)) -> float:
    return group.all_reduce(torch.ones(shape).to(getattr(torch, dtype))).sum().item()


def all_gather(group: Group, dim: int = -1) -> None:
    group.all_gather(torch.ones(2, 576), dim)


def reduce_scatter(group: Group) -> None:
    group.reduce_scatter(torch.ones(6, 576))


def all_to_all(group: Group, dtype: str = "float32", width: int = 576) -> None:
    """Each rank sends one row to each."""
    each = [1] * group.size
    group.all_to_all(torch.ones(group.size, width).to(getattr(torch, dtype)), each, each)


def broadcast(group: Group, src: int, rows: int = 2) -> float:
    return group.broadcast(torch.full((rows, 576), float(group.rank)), src).sum().item()


def barrier(group: Group) -> None:
    group.barrier()


def close(group: Group) -> None:
    group.close()


def send_rows(group: Group, counts: list[list[int]], expected: list[list[int]]) -> list[float]:
    """`counts` has a row for each sender, `expected` one for each receiver. Gives the number of each row's sender."""
    x = torch.full((sum(counts[group.rank]), 576), float(group.rank))
    return group.all_to_all(x, counts[group.rank], expected[group.rank])[:, -1].tolist()


def work_for_ever(group: Group, operation: str, num_rows: int) -> None:
    x = torch.zeros(num_rows * group.size, 576)
    each = [num_rows] * group.size
    while True:
        if operation == "all_reduce":
            group.all_reduce(x[:num_rows])
        elif operation == "reduce_scatter":
            group.reduce_scatter(x)
        else:
            group.all_to_all(x, each, each)


def sleep(_: Group, seconds: float = 3600.0) -> None:
    time.sleep(seconds)


def last_sum_and_exit(group: Group) -> None:
    all_reduce(group)
    os._exit(0)


def last_broadcast_and_exit(group: Group, src: int) -> None:
    broadcast(group, src)
    os._exit(0)


def sum_on_gpu_and_meet(group: Group) -> None:
    group.all_reduce(torch.ones(1000, device="cuda"))
    group.barrier()
