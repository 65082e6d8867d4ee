"""Every rank has one place, every layer one stage, and groups hold whom they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.topology.grid import Grid

grids = st.builds(
    Grid,
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([None, "allgather_reducescatter", "alltoall"]),
)


@given(grid=grids)
def test_every_rank_has_a_place_of_its_own(grid: Grid) -> None:
    places = [grid.coordinates(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size
    assert [grid.rank(*place) for place in places] == list(range(grid.world_size))
    for replica, rank in enumerate(grid.output_ranks):
        assert grid.coordinates(rank) == (replica, grid.pipeline_parallel_size - 1, 0)


@given(grid=grids)
def test_groups(grid: Grid) -> None:
    groups = {group.name: group.ranks for group in grid.groups()}
    assert len(groups) == len(grid.groups()), "a name stands for one group"
    for rank in range(grid.world_size):
        replica, stage, tp_rank = grid.coordinates(rank)
        assert groups[grid.stage_group(replica, stage)].index(rank) == tp_rank
        if stage:
            assert groups[grid.link(replica, stage - 1, tp_rank)] == (grid.rank(replica, stage - 1, tp_rank), rank)
        if grid.all2all_backend == "allgather_reducescatter":
            assert groups[grid.peers(stage, tp_rank)].index(rank) == replica
        if grid.all2all_backend == "alltoall" or grid.moves_experts:
            assert groups[grid.experts(stage)].index(rank) == grid.expert_rank(rank)
    num_links = (grid.pipeline_parallel_size - 1) * grid.tensor_parallel_size * grid.data_parallel_size
    num_expert_groups = 0
    if grid.all2all_backend == "allgather_reducescatter":
        num_expert_groups += grid.pipeline_parallel_size * grid.tensor_parallel_size
    if grid.all2all_backend == "alltoall" or grid.moves_experts:
        num_expert_groups += grid.pipeline_parallel_size
    assert len(groups) == grid.num_groups + num_links + num_expert_groups


def test_two_by_two() -> None:
    assert Grid(2, 2).groups() == (
        ("tp@0", (0, 1), False),
        ("tp@1", (2, 3), False),
        ("pp0-1@0", (0, 2), True),
        ("pp0-1@1", (1, 3), True),
    )
    assert Grid(2, 2).output_ranks == (2,)
    assert Grid(1, 1).groups() == (("tp@0", (0,), False),)


def test_two_replicas() -> None:
    shared = (("tp@0.0", (0, 1), False), ("tp@1.0", (2, 3), False))
    assert Grid(2, 1, 2).groups() == shared
    gathered = Grid(2, 1, 2, "allgather_reducescatter")
    assert gathered.groups() == (*shared, ("dp@0.0", (0, 2), False), ("dp@0.1", (1, 3), False))
    assert Grid(2, 1, 2, "alltoall").groups() == (*shared, ("ep@0", (0, 1, 2, 3), False))
    assert gathered.output_ranks == (0, 2)


@given(grid=grids, num_layers=st.integers(1, 12))
def test_stages_cover_all_layers_in_order_and_none_is_empty(grid: Grid, num_layers: int) -> None:
    stages = range(grid.pipeline_parallel_size)
    if len(stages) > num_layers:
        with pytest.raises(ConfigError, match=f"pipeline_parallel_size: .*at most {num_layers}"):
            grid.stage_layers(num_layers, 0)
        return
    spans = [grid.stage_layers(num_layers, stage) for stage in stages]
    assert [layer for span in spans for layer in range(*span)] == list(range(num_layers))
    assert min(span.size for span in spans) > 0
    assert [span.size for span in spans] == sorted((span.size for span in spans), reverse=True)
    assert spans[0].size - spans[-1].size <= 1
