"""A process group whose ranks are threads of one process: real collectives, without a process to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord, Operation, dtype_name
from phalanx.collectives.group import Group
from phalanx.collectives.row_counts import RowCounts, compare_all
from phalanx.errors import CollectiveMismatchError

TIMEOUT_S = 60.0

Result = TypeVar("Result")


class _Brought(NamedTuple):
    """What one rank lays down. `counts`: for an all_to_all."""

    record: CollectiveRecord
    x: Tensor
    counts: RowCounts | None


class _Table:
    """Where the ranks meet: each lays down what it brings, and all look at everything once everyone has."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.brought: list[_Brought | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)


class ThreadGroup:
    """One rank of a group of threads. A `Group`, in which a thread that waits too long gets BrokenBarrierError."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        self.name = "threads"
        self.rank = rank
        self.size = size
        self._table = table
        self._last: CollectiveRecord | None = None

    @classmethod
    def make(cls, size: int, timeout_s: float = TIMEOUT_S) -> list[ThreadGroup]:
        """All ranks of a new group."""
        table = _Table(size, timeout_s)
        return [cls(rank, size, table) for rank in range(size)]

    @property
    def last(self) -> CollectiveRecord | None:
        return self._last

    def all_reduce(self, x: Tensor) -> Tensor:
        # Every rank adds in rank order, so that all get the same bits.
        return x.copy_(_sum(self._exchange("all_reduce", x)))

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._exchange("all_gather", x), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, x.shape
        return _sum([of_rank.tensor_split(self.size)[self.rank] for of_rank in self._exchange("reduce_scatter", x)])

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        counts = RowCounts(send_counts, receive_counts)
        counts.check(len(x), self.rank, self.size)
        met = self._meet("all_to_all", x, tuple(x.shape[1:]), counts)
        all_counts = [brought.counts for brought in met if brought.counts is not None]
        disagreement = compare_all(all_counts)
        if disagreement is not None:
            raise CollectiveMismatchError(f"in {self._last} {disagreement.describe(range(self.size))}")
        runs_of = [torch.split(rows, list(send)) for (_, rows, _), (send, _) in zip(met, all_counts, strict=True)]
        return torch.cat([runs[self.rank] for runs in runs_of])

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        return x.copy_(self._exchange("broadcast", x)[src])

    def barrier(self) -> None:
        self._exchange("barrier", torch.empty(0))

    def close(self) -> None:
        """Ranks that still wait get BrokenBarrierError."""
        self._table.barrier.abort()

    def _exchange(self, operation: Operation, x: Tensor) -> list[Tensor]:
        return [brought.x for brought in self._meet(operation, x, tuple(x.shape), None)]

    def _meet(
        self, operation: Operation, x: Tensor, shape: tuple[int, ...], counts: RowCounts | None
    ) -> list[_Brought]:
        sequence = self._last.sequence + 1 if self._last else 1
        self._last = CollectiveRecord(self.name, 0, sequence, operation, dtype_name(x.dtype), shape)
        self._table.brought[self.rank] = _Brought(self._last, x.clone(), counts)
        self._table.barrier.wait()
        met = [brought for brought in self._table.brought if brought is not None]
        self._table.barrier.wait()  # nobody lays down the next before all have looked
        for rank, (record, _, _) in enumerate(met):
            if record != self._last:
                raise CollectiveMismatchError(f"rank {self.rank} is in {self._last}, rank {rank} in {record}")
        return met


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).any(0) if tensors[0].dtype == torch.bool else sum(tensors[1:], start=tensors[0])


def run_ranks(size: int, body: Callable[[Group], Result]) -> list[Result]:
    """Run `body` once for each rank, in threads, and return their results by rank.

    When one fails the others' waits end too, and its exception is raised.
    """
    groups = ThreadGroup.make(size)

    def run(group: ThreadGroup) -> Result:
        try:
            return body(group)
        except BaseException:
            group.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, group) for group in groups]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
