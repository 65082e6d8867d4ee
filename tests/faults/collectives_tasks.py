"""What the ranks of a crew are told to do. Functions that a process can be sent: each is called with its group."""

from __future__ import annotations

import os
import time

import torch

from phalanx.collectives.group import Group

OURS = "all_reduce float32 [2, 576]"
"""What errors call `all_reduce` without arguments."""


def all_reduce(group: Group, dtype: str = "float32", shape: tuple[int, ...] = (2, 576)) -> float:
    return group.all_reduce(torch.ones(shape).to(getattr(torch, dtype))).sum().item()


def all_gather(group: Group, dim: int = -1) -> None:
    group.all_gather(torch.ones(2, 576), dim)


def broadcast(group: Group, src: int, rows: int = 2) -> float:
    return group.broadcast(torch.full((rows, 576), float(group.rank)), src).sum().item()


def barrier(group: Group) -> None:
    group.barrier()


def close(group: Group) -> None:
    group.close()


def sum_for_ever(group: Group, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    while True:
        group.all_reduce(x)


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
