"""What every process group can do, whatever carries the data."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord


class Group(Protocol):
    """The ranks of one epoch that compute together. For the use of one thread.

    Every rank calls the same operations in the same order, with tensors of the same dtype and shape. After an error the
    group is of no more use: every later call raises that error again.

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

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """Overwrite `x` with that of rank `src` of this group, in place. Returns `x`."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def close(self) -> None:
        """Leave the group; never blocks on a peer. A peer that still waits for this rank is told. May be repeated."""
        ...
