"""A world of one rank."""

from __future__ import annotations

from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord, Operation, dtype_name
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

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert src == 0, src
        self._record("broadcast", x)
        return x

    def barrier(self) -> None:
        self._record("barrier", None)

    def close(self) -> None:
        """Nothing is held."""

    def _record(self, operation: Operation, x: Tensor | None) -> None:
        self._sequence += 1
        self._issued = (operation, "", ()) if x is None else (operation, dtype_name(x.dtype), tuple(x.shape))
