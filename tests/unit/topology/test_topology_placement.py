"""Where ranks go: few nodes, the driver's first, tensor-parallel groups whole as long as that is possible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import PlacementError
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Bundle, Demand, Node, Place, place_in_bundles, place_ranks, split_groups

GPU = Demand("GPU", 1.0, is_device=True)


def cluster(*free: float, driver: int | None = 0, total: float | None = None) -> list[Node]:
    return [
        Node(f"id{i}", f"host{i}", f"10.0.0.{i}", amount if total is None else total, amount, is_driver=i == driver)
        for i, amount in enumerate(free)
    ]


def homes(places: tuple[Place, ...]) -> list[str]:
    return [place.node_id for place in places]


grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
clusters = st.lists(st.integers(0, 6), min_size=1, max_size=5).flatmap(
    lambda free: st.builds(lambda driver: cluster(*free, driver=driver), st.integers(0, len(free) - 1))
)


def can_stay_whole(grid: Grid, nodes: list[Node]) -> bool:
    """By trying every way of giving whole groups to nodes."""
    counts = [range(int(node.free) // grid.tensor_parallel_size + 1) for node in nodes]
    return any(sum(ways) == grid.num_groups for ways in itertools.product(*counts))


@given(grids, clusters, st.booleans())
def test_every_placement_is_sound(grid: Grid, nodes: list[Node], may_split: bool) -> None:
    whole = can_stay_whole(grid, nodes)
    has_room = sum(node.free for node in nodes) >= grid.world_size
    if not (whole or (may_split and has_room)):
        with pytest.raises(PlacementError):
            place_ranks(grid, GPU, nodes, may_split=may_split)
        return
    places = place_ranks(grid, GPU, nodes, may_split=may_split)
    assert [place.rank for place in places] == list(range(grid.world_size))
    assert [place.bundle for place in places] == list(range(grid.world_size))
    for node in nodes:
        assert homes(places).count(node.node_id) <= node.free
    assert (split_groups(grid, places) == ()) == whole
    driver = next(node for node in nodes if node.is_driver)
    if driver.free >= grid.tensor_parallel_size:
        assert places[0].node_id == driver.node_id
    assert place_ranks(grid, GPU, list(reversed(nodes)), may_split=may_split) == places


@given(grids, clusters, st.booleans(), st.randoms())
def test_bundles_are_as_good_as_nodes(grid: Grid, nodes: list[Node], may_split: bool, random: object) -> None:
    """A placement group with a bundle for each device allows what the nodes themselves would allow."""
    owners = [node.node_id for node in nodes for _ in range(int(node.free))]
    random.shuffle(owners)  # type: ignore[attr-defined]
    bundles = [Bundle(index, owner, 1.0) for index, owner in enumerate(owners)]
    try:
        expected = homes(place_ranks(grid, GPU, nodes, may_split=may_split))
    except PlacementError:
        with pytest.raises(PlacementError):
            place_in_bundles(grid, GPU, nodes, bundles, indices=None, may_split=may_split)
        return
    places = place_in_bundles(grid, GPU, nodes, bundles, indices=None, may_split=may_split)
    assert homes(places) == expected
    assert len({place.bundle for place in places}) == len(places)
    assert all(owners[place.bundle] == place.node_id for place in places)


@given(grids, clusters, st.booleans(), st.integers(0, 3))
def test_so_many_replicas_are_on_the_drivers_node(
    grid: Grid, nodes: list[Node], may_split: bool, num_local: int
) -> None:
    """The others are where they would be if the driver's node were not there."""
    num_local = min(num_local, grid.data_parallel_size)
    (driver,) = (node for node in nodes if node.is_driver)
    others = [node for node in nodes if not node.is_driver]
    expected: list[str] | None = []
    for part, count in (([driver], num_local), (others, grid.data_parallel_size - num_local)):
        if count and expected is not None:
            try:
                expected += homes(place_ranks(grid._replace(data_parallel_size=count), GPU, part, may_split=may_split))
            except PlacementError:
                expected = None
    owners = [node.node_id for node in nodes for _ in range(int(node.free))]
    bundles = [Bundle(index, owner, 1.0) for index, owner in enumerate(owners)]
    settings = {"may_split": may_split, "num_local": num_local}
    if expected is None:
        with pytest.raises(PlacementError, match="data_parallel_size_local") as caught:
            place_ranks(grid, GPU, nodes, **settings)
        missing = caught.value.table.splitlines()[-1].split()
        assert missing[0] == "missing"
        assert int(missing[2]) > 0, "groups"
        with pytest.raises(PlacementError, match="data_parallel_size_local"):
            place_in_bundles(grid, GPU, nodes, bundles, indices=None, **settings)
        return
    places = place_ranks(grid, GPU, nodes, **settings)
    assert homes(places) == expected
    for place in places:
        assert (place.node_id == driver.node_id) == (grid.coordinates(place.rank).replica < num_local)
    held = place_in_bundles(grid, GPU, nodes, bundles, indices=None, **settings)
    assert homes(held) == expected
    given_indices = tuple(place.bundle for place in held)
    assert place_in_bundles(grid, GPU, nodes, bundles, indices=given_indices, **settings) == held


def test_indices_that_contradict_how_many_replicas_are_local() -> None:
    bundles = [Bundle(index, f"id{index // 2}", 1.0) for index in range(4)]
    with pytest.raises(PlacementError, match=r"rank 1 of replica 1 is to be in bundle 1, which is not on other nodes"):
        place_in_bundles(Grid(1, 1, 2), GPU, cluster(2, 2), bundles, indices=(0, 1), may_split=False, num_local=1)
    with pytest.raises(PlacementError, match=r"rank 0 of replica 0 is to be in bundle 2, which is not on the driver's"):
        place_in_bundles(Grid(1, 1, 2), GPU, cluster(2, 2), bundles, indices=(2, 3), may_split=False, num_local=1)


def test_where_replicas_do_not_fit_is_said() -> None:
    complaint = (
        r"^3 of 4 replicas are to be on other nodes than the driver's \(data_parallel_size_local\): 6 ranks \(.*\) of "
        r"1 GPU each are asked for and the cluster has room for 4 there"
    )
    with pytest.raises(PlacementError, match=complaint):
        place_ranks(Grid(2, 1, 4), GPU, cluster(8, 2, 2), may_split=False, num_local=1)


def test_the_driver_comes_first_then_the_roomiest() -> None:
    assert homes(place_ranks(Grid(2, 3), GPU, cluster(2, 2, 4), may_split=False)) == ["id0"] * 2 + ["id2"] * 4


def test_a_group_goes_where_it_fits_whole_even_if_the_driver_has_some_room() -> None:
    assert homes(place_ranks(Grid(4, 1), GPU, cluster(3, 4), may_split=True)) == ["id1"] * 4


def test_only_what_cannot_stay_whole_is_split() -> None:
    places = place_ranks(Grid(2, 3), GPU, cluster(3, 3), may_split=True)
    assert homes(places) == ["id0", "id0", "id1", "id1", "id0", "id1"]
    assert split_groups(Grid(2, 3), places) == ("tp@2",)


def test_ranks_never_share_a_device() -> None:
    half = Demand("GPU", 0.4, is_device=True)
    assert homes(place_ranks(Grid(1, 2), half, cluster(2.0), may_split=False)) == ["id0"] * 2
    with pytest.raises(PlacementError):
        place_ranks(Grid(1, 2), half, cluster(1.0), may_split=False)
    place_ranks(Grid(1, 2), half._replace(resource="CPU", is_device=False), cluster(1.0), may_split=False)


def test_the_table_says_what_is_asked_for_what_there_is_and_what_is_missing() -> None:
    with pytest.raises(PlacementError) as caught:
        place_ranks(Grid(4, 2), GPU, cluster(4, 1, total=4), may_split=False)
    assert "8 ranks (tensor_parallel_size 4, pipeline_parallel_size 2) of 1 GPU each" in caught.value.complaint
    assert "the cluster has room for 5" in caught.value.complaint
    assert [line.split() for line in caught.value.table.splitlines()] == [
        ["node", "address", "GPU", "free", "GPU", "in", "all", "room", "for", "ranks", "groups", "of", "4"],
        ["host0", "(driver)", "10.0.0.0", "4", "4", "4", "1"],
        ["host1", "10.0.0.1", "1", "4", "1", "0"],
        ["asked", "for", "8", "8", "2"],
        ["missing", "3", "1"],
    ]
    assert str(caught.value) == f"{caught.value.complaint}\n{caught.value.table}"


def test_what_would_fit_if_groups_were_split_is_said() -> None:
    with pytest.raises(PlacementError, match=r"of 1 groups the cluster has room for 0; allow_split_tensor_parallel"):
        place_ranks(Grid(4, 1), GPU, cluster(2, 2), may_split=False)


def test_indices_are_taken_as_they_are() -> None:
    bundles = [Bundle(0, "id0", 1), Bundle(1, "id1", 1), Bundle(2, "id0", 1), Bundle(3, "id1", 1)]
    places = place_in_bundles(Grid(2, 2), GPU, cluster(0, 0), bundles, indices=(3, 1, 0, 2), may_split=False)
    assert [(place.bundle, place.node_id) for place in places] == [(3, "id1"), (1, "id1"), (0, "id0"), (2, "id0")]


@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        ((0, 1), "2 bundle indices are given for 4 ranks"),
        ((0, 1, 2, 4), "rank 3 is to be in bundle 4, which the placement group has not"),
        ((0, 1, 2, 0), "rank 0 and rank 3 are both to be in bundle 0"),
        ((0, 1, 2, 3), r"rank 3 is to be in bundle 3, which has 0.5 GPU left, and a rank needs 1"),
        ((0, 5, 1, 2), r"split a tensor-parallel group \(rank 0 on host0, rank 1 on host1\)"),
    ],
)
def test_indices_that_contradict_ranks_or_nodes(indices: tuple[int, ...], complaint: str) -> None:
    held = {0: "id0", 1: "id0", 2: "id1", 3: "id1", 5: "id1"}
    bundles = [Bundle(index, node, 0.5 if index == 3 else 1.0) for index, node in held.items()]
    with pytest.raises(PlacementError, match=complaint) as caught:
        place_in_bundles(Grid(2, 2), GPU, cluster(0, 0), bundles, indices=indices, may_split=False)
    assert "0 (1) 1 (1)" in caught.value.table


def test_bundles_with_too_little_are_passed_over() -> None:
    bundles = [Bundle(0, "id0", 0.0), Bundle(1, "id0", 1.0), Bundle(2, "id0", 8.0)]
    places = place_in_bundles(Grid(2, 1), GPU, cluster(0), bundles, indices=None, may_split=False)
    assert [place.bundle for place in places] == [1, 2]
