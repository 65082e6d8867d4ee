"""Where each rank stands: in which replica and stage of it, with which share of its layers, beside and behind whom."""

from __future__ import annotations

from typing import NamedTuple

from phalanx.config import All2All, ParallelConfig
from phalanx.errors import ConfigError
from phalanx.topology.sharding import Span, split


class Coordinates(NamedTuple):
    """A rank's place. Stages are numbered in the order in which a token passes through them."""

    replica: int
    stage: int
    tp_rank: int


class GroupMembers(NamedTuple):
    """A process group: its name, and the global ranks of its members in group order."""

    name: str
    ranks: tuple[int, ...]
    is_link: bool = False
    """Whether it joins two stages: the first member gives, the second gets."""


class Grid(NamedTuple):
    """`data_parallel_size` replicas of `pipeline_parallel_size` stages of `tensor_parallel_size` ranks each.

    The ranks of a stage are neighbours, and so are the stages of a replica. A stage holds some consecutive layers of
    the model, its ranks share every one of them. Between two stages each rank has one link, to the rank with its own
    tp_rank, over which it gets or gives hidden states. Every replica has all of the model but its experts: these are
    shared out to all ranks of a stage, whatever their replica, which form its expert-parallel group.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int = 1
    all2all_backend: All2All | None = None
    """None if experts are not shared out one by one."""
    moves_experts: bool = False
    """Whether ranks that share out experts exchange some while they serve."""

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Grid:
        return cls(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.data_parallel_size,
            parallel.all2all_backend if parallel.enable_expert_parallel else None,
            parallel.enable_expert_parallel and parallel.enable_eplb,
        )

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def num_groups(self) -> int:
        """Stages of all replicas: groups of ranks that share every one of their layers."""
        return self.data_parallel_size * self.pipeline_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that a layer's experts are shared out to."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def output_ranks(self) -> tuple[int, ...]:
        """The rank of each replica that samples and answers for a step: the first one of the last stage."""
        last = self.pipeline_parallel_size - 1
        return tuple(self.rank(replica, last, 0) for replica in range(self.data_parallel_size))

    def rank(self, replica: int, stage: int, tp_rank: int) -> int:
        return (replica * self.pipeline_parallel_size + stage) * self.tensor_parallel_size + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, rank
        row, tp_rank = divmod(rank, self.tensor_parallel_size)
        return Coordinates(*divmod(row, self.pipeline_parallel_size), tp_rank)

    def expert_rank(self, rank: int) -> int:
        """The rank's place in its stage's expert-parallel group."""
        replica, _, tp_rank = self.coordinates(rank)
        return replica * self.tensor_parallel_size + tp_rank

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
        """Every group: those of the stages, which may have a single member, then the links, then those of the experts.

        Ranks that join their groups in this order never wait for each other in a circle.
        """
        replicas, stages, tp_ranks = self._axes()
        shared = [
            GroupMembers(self.stage_group(replica, stage), tuple(self.rank(replica, stage, tp) for tp in tp_ranks))
            for replica in replicas
            for stage in stages
        ]
        links = [
            GroupMembers(
                self.link(replica, stage, tp_rank),
                (self.rank(replica, stage, tp_rank), self.rank(replica, stage + 1, tp_rank)),
                is_link=True,
            )
            for replica in replicas
            for stage in stages[:-1]
            for tp_rank in tp_ranks
        ]
        experts: list[GroupMembers] = []
        if self.all2all_backend == "allgather_reducescatter":
            experts = [
                GroupMembers(self.peers(stage, tp_rank), tuple(self.rank(dp, stage, tp_rank) for dp in replicas))
                for stage in stages
                for tp_rank in tp_ranks
            ]
        if self.all2all_backend == "alltoall" or self.moves_experts:
            experts += [
                GroupMembers(self.experts(stage), tuple(self.rank(dp, stage, tp) for dp in replicas for tp in tp_ranks))
                for stage in stages
            ]
        return (*shared, *links, *experts)

    def stage_group(self, replica: int, stage: int) -> str:
        """The name of the group of the ranks that share a stage's layers."""
        return f"tp@{self._place(replica, stage)}"

    def link(self, replica: int, stage: int, tp_rank: int) -> str:
        """The name of the group of two in which a rank of `stage` gives hidden states to the stage after it."""
        return f"pp{stage}-{stage + 1}@{self._place(replica, tp_rank)}"

    def peers(self, stage: int, tp_rank: int) -> str:
        """The name of the group of the ranks of a stage that have the same tp_rank, one of each replica."""
        return f"dp@{stage}.{tp_rank}"

    def experts(self, stage: int) -> str:
        """The name of a stage's expert-parallel group, in the order of `expert_rank`."""
        return f"ep@{stage}"

    def _axes(self) -> tuple[range, range, range]:
        """Replicas, stages, and the ranks of a stage's tensor-parallel group."""
        return range(self.data_parallel_size), range(self.pipeline_parallel_size), range(self.tensor_parallel_size)

    def _place(self, replica: int, index: int) -> str:
        """Replicas are told apart only where there are several."""
        return str(index) if self.data_parallel_size == 1 else f"{replica}.{index}"
