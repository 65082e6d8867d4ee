"""Each rank finds its place among the groups that it has joined."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.topology.grid import Grid
from phalanx.worker.stage import Stage


def stage_of(grid: Grid, rank: int) -> Stage:
    joined: dict[str, Any] = {
        group.name: SimpleNamespace(name=group.name, rank=group.ranks.index(rank))
        for group in grid.groups()
        if rank in group.ranks
    }
    return Stage.of(grid, rank, joined)


def names(stage: Stage) -> tuple[str | None, ...]:
    return tuple(group and group.name for group in (stage.upstream, stage.shared, stage.downstream))


def test_a_middle_stage_gets_and_gives() -> None:
    grid = Grid(2, 3)
    assert [names(stage_of(grid, rank)) for rank in range(6)] == [
        (None, "tp@0", "pp0-1@0"),
        (None, "tp@0", "pp0-1@1"),
        ("pp0-1@0", "tp@1", "pp1-2@0"),
        ("pp0-1@1", "tp@1", "pp1-2@1"),
        ("pp1-2@0", "tp@2", None),
        ("pp1-2@1", "tp@2", None),
    ]


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(4, 1), Grid(1, 3), Grid(2, 2), Grid(2, 2, 3)])
def test_one_rank_of_each_replica_samples(grid: Grid) -> None:
    stages = [stage_of(grid, rank) for rank in range(grid.world_size)]
    assert [rank for rank, stage in enumerate(stages) if stage.is_output] == list(grid.output_ranks)
    assert {stage.is_pipelined for stage in stages} == {grid.pipeline_parallel_size > 1}
