"""Replicas that compute every step together: which of them takes a request, and what all of them compute next.

A pure core, as the scheduler is. The ranks of all replicas meet in the collectives of their experts, so that a step is
one for all of them: a replica without work takes part with nothing to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.request import Request
from phalanx.engine.router import choose
from phalanx.engine.scheduler import PlannedStep, Scheduler
from phalanx.protocol import LogprobColumns, StepResult, TokenBatch, as_floats, as_ints, ints


class Lockstep:
    """The replicas' schedulers as one. Plans may be ahead of commits, as each scheduler's may."""

    def __init__(self, replicas: Sequence[Scheduler]) -> None:
        assert replicas
        self.replicas = tuple(replicas)

    def __len__(self) -> int:
        """Requests that have not ended."""
        return sum(map(len, self.replicas))

    def __contains__(self, request_id: int) -> bool:
        return any(request_id in replica for replica in self.replicas)

    def add(self, request: Request) -> None:
        """Queue a request with the replica that suits it best."""
        cached = [replica.num_cached(request) for replica in self.replicas]
        self.replicas[choose(cached, list(map(len, self.replicas)))].add(request)

    def cancel(self, request_ids: Iterable[int]) -> list[int]:
        """Forget requests, whatever they are doing; gives the ids of those that had not ended."""
        request_ids = list(request_ids)
        return [request_id for replica in self.replicas for request_id in replica.cancel(request_ids)]

    def reset_prefix_cache(self) -> None:
        """Have no request admitted from now on find what is cached now."""
        for replica in self.replicas:
            replica.reset_prefix_cache()

    def plan(self) -> tuple[PlannedStep, ...] | None:
        """The next step of each replica, or None if none of them can compute anything before a commit."""
        planned = [replica.plan() for replica in self.replicas]
        if not any(planned):
            return None
        return tuple(
            replica.plan_nothing() if step is None else step
            for replica, step in zip(self.replicas, planned, strict=True)
        )

    def commit(self, step: Sequence[PlannedStep], results: Sequence[StepResult]) -> TokenBatch:
        """Take in what a step made; gives the tokens that may leave now and the requests that they end."""
        return merge(
            [
                replica.commit(planned, result)
                for replica, planned, result in zip(self.replicas, step, results, strict=True)
            ]
        )


def merge(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch with the tokens of several."""
    if len(batches) == 1:
        return batches[0]
    return TokenBatch(
        request_ids=b"".join(batch.request_ids for batch in batches),
        tokens=b"".join(batch.tokens for batch in batches),
        finished=tuple(end for batch in batches for end in batch.finished),
        logprobs=_merge_logprobs(batches),
        errors=tuple(error for batch in batches for error in batch.errors),
        cached=tuple(entry for batch in batches for entry in batch.cached),
    )


def _merge_logprobs(batches: Sequence[TokenBatch]) -> LogprobColumns | None:
    """The entries of all batches by their places in the merged one; those with fewer likely tokens are filled up."""
    found = []
    start = 0
    for batch in batches:
        if batch.logprobs is not None:
            found.append((start, batch.logprobs))
        start += len(as_ints(batch.tokens))
    if not found:
        return None
    width = max(columns.width for _, columns in found)
    return LogprobColumns(
        entries=ints(np.concatenate([as_ints(columns.entries) + start for start, columns in found])),
        chosen=b"".join(columns.chosen for _, columns in found),
        width=width,
        top_ids=b"".join(_widened(as_ints(columns.top_ids), columns, width) for _, columns in found),
        top_logprobs=b"".join(_widened(as_floats(columns.top_logprobs), columns, width) for _, columns in found),
    )


def _widened(column: NDArray[np.int32] | NDArray[np.float32], columns: LogprobColumns, width: int) -> bytes:
    shape = (len(as_ints(columns.entries)), columns.width)
    return np.pad(column.reshape(shape), ((0, 0), (0, width - columns.width))).tobytes()
