"""What every process group can do, whatever carries the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord


class Group(Protocol):
    """The ranks of one epoch that compute together. For the use of one thread.

    Every rank calls the same operations in the same order, with tensors of the same dtype and shape; those of an
    all_to_all may differ in their number of rows. After an error the group is of no more use: every later call raises
    that error again.

    Raises, from every operation:
        CollectiveMismatchError: a peer is in another operation, or in the same one with another dtype or shape.
        DeadlineError: a peer did not come within the group's `timeout_s`.
        PeerDiedError: a peer's process is gone.
    """

    name: str
    rank: int
    """This rank's place in the group, from 0. Errors name global ranks."""
    size: int

    @property
    def last(self) -> CollectiveRecord | None:
        """The collective that was issued last, for error messages; None before the first."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks (logical or, for bool), in place. Returns `x`. All ranks get the same bits."""
        ...

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """The `x` of all ranks, in rank order, concatenated along `dim`. `x` has at least one dimension."""
        ...

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's part of the sum of `x` over the ranks: what `all_reduce` gives, cut along the first dimension.

        `x` is [size * N, ...] with rank r's part from r * N on; the result is [N, ...]. `x` stays as it is. Where
        Gloo's or NCCL's own collectives add up, the order of the additions may be another than that of `all_reduce`.
        """
        ...

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Send each rank its own rows, and receive the rows that each has for this one.

        `x` is [sum(send_counts), ...]: first the rows for rank 0, then those for rank 1, and so on. The result is
        [sum(receive_counts), ...]: the rows from rank 0 first. The counts have an entry for each rank, this one too,
        and may be anything from 0 on; whoever has no rows takes part all the same, with the others' dtype and row.
        `last` and what the ranks compare have the shape of a row, so that they do not depend on the counts.

        Raises CollectiveMismatchError, which names both ranks, if one sends another number of rows than the other
        expects. NCCL does not see this.
        """
        ...

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """Overwrite `x` with that of rank `src` of this group, in place. Returns `x`."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def close(self) -> None:
        """Leave the group; never blocks on a peer. A peer that still waits for this rank is told. May be repeated."""
        ...
