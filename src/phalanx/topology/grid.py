"""Where each rank stands: in which stage of the pipeline, with which share of its layers, beside and behind whom."""

from __future__ import annotations

from typing import NamedTuple

from phalanx.config import ParallelConfig
from phalanx.errors import ConfigError
from phalanx.topology.sharding import Span, split


class Coordinates(NamedTuple):
    """A rank's place. Stages are numbered in the order in which a token passes through them."""

    stage: int
    tp_rank: int


class GroupMembers(NamedTuple):
    """A process group: its name, and the global ranks of its members in group order."""

    name: str
    ranks: tuple[int, ...]
    is_link: bool
    """Whether it joins two stages: the first member gives, the second gets."""


class Grid(NamedTuple):
    """`pipeline_parallel_size` stages of `tensor_parallel_size` ranks each. The ranks of a stage are neighbours.

    A stage holds some consecutive layers of the model, its ranks share every one of them. Between two stages each rank
    has one link, to the rank with its own tp_rank, over which it gets or gives hidden states.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Grid:
        return cls(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def output_rank(self) -> int:
        """The rank that samples and answers for a step: the first one of the last stage."""
        return self.rank(self.pipeline_parallel_size - 1, 0)

    def rank(self, stage: int, tp_rank: int) -> int:
        return stage * self.tensor_parallel_size + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, rank
        return Coordinates(*divmod(rank, self.tensor_parallel_size))

    def stage_layers(self, num_layers: int, stage: int) -> Span:
        """The layers of a stage. Stages differ by one at most, the first ones having more: the last has the head too.

        Raises ConfigError: there are fewer layers than stages.
        """
        if self.pipeline_parallel_size > num_layers:
            raise ConfigError(
                "pipeline_parallel_size",
                self.pipeline_parallel_size,
                f"at most {num_layers} for this model: every stage needs one of its layers",
            )
        return split(num_layers, self.pipeline_parallel_size, stage)

    def groups(self) -> tuple[GroupMembers, ...]:
        """Every group: those of the stages, which may have a single member, then the links.

        Ranks that join their groups in this order never wait for each other in a circle.
        """
        stages, tp_ranks = range(self.pipeline_parallel_size), range(self.tensor_parallel_size)
        shared = [
            GroupMembers(stage_group(stage), tuple(self.rank(stage, tp_rank) for tp_rank in tp_ranks), False)
            for stage in stages
        ]
        links = [
            GroupMembers(link(stage, tp_rank), (self.rank(stage, tp_rank), self.rank(stage + 1, tp_rank)), True)
            for stage in stages[:-1]
            for tp_rank in tp_ranks
        ]
        return (*shared, *links)


def stage_group(stage: int) -> str:
    """The name of the group of the ranks that share a stage's layers."""
    return f"tp@{stage}"


def link(stage: int, tp_rank: int) -> str:
    """The name of the group of two in which a rank of `stage` gives hidden states to the stage after it."""
    return f"pp{stage}-{stage + 1}@{tp_rank}"
