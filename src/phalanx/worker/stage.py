"""A rank's place in the pipeline: with whom it shares its layers, whence hidden states come, and where they go.

Shape suffixes: T tokens of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phalanx.topology.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from phalanx.collectives.group import Group


@dataclass(frozen=True, slots=True)
class Stage:
    """The groups of one rank. A link has two members, of which the one upstream gives and the other gets."""

    shared: Group
    """The ranks that hold the same layers."""
    upstream: Group | None = None
    """None on the first stage."""
    downstream: Group | None = None
    """None on the last stage."""

    @classmethod
    def of(cls, grid: Grid, rank: int, groups: Mapping[str, Group]) -> Stage:
        """Among the groups that the rank has joined, by name."""
        replica, stage, tp_rank = grid.coordinates(rank)
        return cls(
            groups[grid.stage_group(replica, stage)],
            groups.get(grid.link(replica, stage - 1, tp_rank)),
            groups.get(grid.link(replica, stage, tp_rank)),
        )

    @property
    def is_pipelined(self) -> bool:
        """Whether there are other stages."""
        return self.upstream is not None or self.downstream is not None

    @property
    def is_output(self) -> bool:
        """Whether this rank samples."""
        return self.downstream is None and self.shared.rank == 0

    def receive(self, hidden_TD: Tensor) -> Tensor:
        """Fill with the hidden states of the stage before, and return it. Raises what the link's collectives raise."""
        assert self.upstream is not None
        return self.upstream.broadcast(hidden_TD, src=0)

    def send(self, hidden_TD: Tensor) -> None:
        """Give hidden states to the next stage. Raises what the link's collectives raise."""
        assert self.downstream is not None
        self.downstream.broadcast(hidden_TD, src=0)
