"""A world of one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord, Operation, dtype_name
from phalanx.collectives.row_counts import RowCounts
from phalanx.collectives.spec import GroupSpec


class SingleGroup:
    """A `Group` whose every operation is done when it is called."""

    def __init__(self, spec: GroupSpec) -> None:
        assert spec.size == 1
        self.name = spec.name
        self.rank = 0
        self.size = 1
        self._epoch = spec.epoch
        self._sequence = 0
        self._issued: tuple[Operation, str, tuple[int, ...]] | None = None

    @property
    def last(self) -> CollectiveRecord | None:
        if self._issued is None:
            return None
        return CollectiveRecord(self.name, self._epoch, self._sequence, *self._issued)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._record("all_reduce", x)
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        assert -x.dim() <= dim < x.dim(), dim
        self._record("all_gather", x)
        return x.clone()

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.dim() > 0
        self._record("reduce_scatter", x)
        return x.clone(memory_format=torch.contiguous_format)

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        RowCounts(send_counts, receive_counts).check(len(x), 0, 1)
        self._record("all_to_all", x, x.shape[1:])
        return x.clone(memory_format=torch.contiguous_format)

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert src == 0, src
        self._record("broadcast", x)
        return x

    def barrier(self) -> None:
        self._record("barrier", None)

    def close(self) -> None:
        """Nothing is held."""

    def _record(self, operation: Operation, x: Tensor | None, shape: Sequence[int] | None = None) -> None:
        """`shape`: if it is not that of `x`."""
        self._sequence += 1
        if x is None:
            self._issued = (operation, "", ())
        else:
            self._issued = (operation, dtype_name(x.dtype), tuple(x.shape if shape is None else shape))
