"""Every rank has one place, every layer one stage, and groups hold whom they should."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import ConfigError
from phalanx.topology.grid import Grid, link, stage_group

grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 5))


@given(grid=grids)
def test_every_rank_has_a_place_of_its_own(grid: Grid) -> None:
    places = [grid.coordinates(rank) for rank in range(grid.world_size)]
    assert len(set(places)) == grid.world_size
    assert [grid.rank(*place) for place in places] == list(range(grid.world_size))
    assert grid.coordinates(grid.output_rank) == (grid.pipeline_parallel_size - 1, 0)


@given(grid=grids)
def test_groups(grid: Grid) -> None:
    groups = {group.name: group.ranks for group in grid.groups()}
    assert len(groups) == len(grid.groups()), "a name stands for one group"
    for rank in range(grid.world_size):
        stage, tp_rank = grid.coordinates(rank)
        assert groups[stage_group(stage)].index(rank) == tp_rank
        if stage:
            assert groups[link(stage - 1, tp_rank)] == (grid.rank(stage - 1, tp_rank), rank)
    num_links = (grid.pipeline_parallel_size - 1) * grid.tensor_parallel_size
    assert len(groups) == grid.pipeline_parallel_size + num_links


def test_two_by_two() -> None:
    assert Grid(2, 2).groups() == (
        ("tp@0", (0, 1), False),
        ("tp@1", (2, 3), False),
        ("pp0-1@0", (0, 2), True),
        ("pp0-1@1", (1, 3), True),
    )
    assert Grid(2, 2).output_rank == 2
    assert Grid(1, 1).groups() == (("tp@0", (0,), False),)


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
