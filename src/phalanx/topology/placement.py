"""Which node holds which rank: from what the nodes have to a place for every rank, or an error with what is missing.

Pure arithmetic, the same answer for the same question. The driver's node comes first, so that rank 0 is beside the
brain; then the nodes with the most room, so that few nodes are used. The ranks of a tensor-parallel group meet many
times in every step, so they stay on one node as long as any way of placing them allows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from phalanx.errors import PlacementError
from phalanx.topology.grid import Grid

_TOLERANCE = 1e-6
"""Fractions of a device come as floats."""


class Node(NamedTuple):
    """A node and what it has of the resource that ranks take."""

    node_id: str
    name: str
    address: str
    total: float
    free: float
    is_driver: bool = False
    is_avoided: bool = False
    """Whether no rank is to come there, whatever is free."""

    def is_called(self, name: str) -> bool:
        """Whether a user means this one: by its name, its address or its id."""
        return name in (self.name, self.address, self.node_id)


class Demand(NamedTuple):
    """What each rank takes. Ranks of one run never share a device: NCCL refuses it."""

    resource: str
    per_rank: float
    is_device: bool

    @classmethod
    def on(cls, device: str, per_rank: float) -> Demand:
        """Of ranks that compute on `cuda` or `cpu`."""
        return cls("GPU" if device == "cuda" else "CPU", per_rank, device == "cuda")


class Bundle(msgspec.Struct, frozen=True):
    """A bundle of a placement group that exists. `free` is what its user has left of the resource that ranks take."""

    index: int
    node_id: str
    free: float


class Place(NamedTuple):
    """Where a rank goes. `bundle` is an index into the placement group, which for new ones is the rank itself."""

    rank: int
    node_id: str
    bundle: int


class _Part(NamedTuple):
    """Replicas and the nodes that are to hold them."""

    nodes: tuple[Node, ...]
    num_replicas: int
    where: str = ""
    """In words; empty for all replicas on any node."""


def avoiding(nodes: Sequence[Node], names: Collection[str]) -> list[Node]:
    """The same nodes, those marked that go by one of these names."""
    return [node._replace(is_avoided=any(map(node.is_called, names))) for node in nodes]


def place_ranks(
    grid: Grid, demand: Demand, nodes: Sequence[Node], *, may_split: bool, num_local: int | None = None
) -> tuple[Place, ...]:
    """A place for each rank on nodes with room, in rank order.

    With `may_split` a tensor-parallel group may span nodes if there is no other way. With `num_local` the first so many
    replicas are on the driver's node and the others are not. Raises PlacementError.
    """
    room = {node.node_id: _room(demand, node) for node in nodes}
    order = _order(nodes, room)
    parts = _parts(grid, order, num_local)
    holders = _fill_parts(grid, parts, room, may_split)
    if holders is None:
        raise PlacementError(_complaint(grid, demand, parts, room, may_split), _table(grid, demand, parts, order, room))
    return tuple(Place(rank, node_id, rank) for rank, node_id in enumerate(holders))


def place_in_bundles(
    grid: Grid,
    demand: Demand,
    nodes: Sequence[Node],
    bundles: Sequence[Bundle],
    *,
    indices: Sequence[int] | None,
    may_split: bool,
    num_local: int | None = None,
) -> tuple[Place, ...]:
    """A place for each rank in bundles that exist: rank r in bundle `indices[r]` if indices are given.

    Bundles with too little of the resource are passed over, unless they are among `indices`. `may_split` and
    `num_local` are as for `place_ranks`. Raises PlacementError.
    """
    fit = {bundle.index: bundle for bundle in bundles if bundle.free >= demand.per_rank - _TOLERANCE}
    avoided = {node.node_id for node in nodes if node.is_avoided}
    room = Counter(bundle.node_id for bundle in fit.values() if bundle.node_id not in avoided)
    order = _order(nodes, room)
    parts = _parts(grid, order, num_local)
    table = _table(grid, demand, parts, order, room, bundles)
    if indices is not None:
        _check_indices(grid, demand, indices, bundles, fit, table)
        places = tuple(Place(rank, fit[index].node_id, index) for rank, index in enumerate(indices))
        _check_groups(grid, places, {node.node_id: node.name for node in nodes}, may_split, table)
        _check_parts(grid, places, parts, table)
        return places
    holders = _fill_parts(grid, parts, room, may_split)
    if holders is None:
        raise PlacementError(_complaint(grid, demand, parts, room, may_split, in_bundles=True), table)
    waiting = {node.node_id: iter(sorted(i for i in fit if fit[i].node_id == node.node_id)) for node in nodes}
    return tuple(Place(rank, node_id, next(waiting[node_id])) for rank, node_id in enumerate(holders))


def split_groups(grid: Grid, places: Sequence[Place]) -> tuple[str, ...]:
    """Names of the tensor-parallel groups that span nodes."""
    nodes_of: dict[str, set[str]] = {}
    for place in places:
        nodes_of.setdefault(_group_of(grid, place), set()).add(place.node_id)
    return tuple(name for name, holders in nodes_of.items() if len(holders) > 1)


def _group_of(grid: Grid, place: Place) -> str:
    replica, stage, _ = grid.coordinates(place.rank)
    return grid.stage_group(replica, stage)


def _room(demand: Demand, node: Node) -> int:
    """How many ranks a node has room for."""
    if node.is_avoided:
        return 0
    ranks = int(node.free / demand.per_rank + _TOLERANCE)
    return min(ranks, int(node.total + _TOLERANCE)) if demand.is_device else ranks


def _order(nodes: Sequence[Node], room: Mapping[str, int]) -> list[Node]:
    return sorted(nodes, key=lambda node: (not node.is_driver, -room.get(node.node_id, 0), node.address, node.node_id))


def _parts(grid: Grid, order: Sequence[Node], num_local: int | None) -> tuple[_Part, ...]:
    """In the order of their replicas."""
    if num_local is None:
        return (_Part(tuple(order), grid.data_parallel_size),)
    here = tuple(node for node in order if node.is_driver)
    elsewhere = tuple(node for node in order if not node.is_driver)
    return (
        _Part(here, num_local, "on the driver's node"),
        _Part(elsewhere, grid.data_parallel_size - num_local, "on other nodes than the driver's"),
    )


def _fill_parts(grid: Grid, parts: Sequence[_Part], room: Mapping[str, int], may_split: bool) -> list[str] | None:
    """The node of each rank; None if some part has too little room."""
    holders: list[str] = []
    for part in parts:
        held = _fill(grid, part, room, may_split)
        if held is None:
            return None
        holders += held
    return holders


def _fill(grid: Grid, part: _Part, room: Mapping[str, int], may_split: bool) -> list[str] | None:
    """The node of each rank: as many whole groups as the nodes can hold, then, if allowed, what is left of them."""
    size, num_groups = grid.tensor_parallel_size, part.num_replicas * grid.pipeline_parallel_size
    rooms = [(node.node_id, room.get(node.node_id, 0)) for node in part.nodes]
    whole = [node_id for node_id, ranks in rooms for _ in range(ranks // size)][:num_groups]
    used = Counter(whole)
    left = [node_id for node_id, ranks in rooms for _ in range(ranks - used[node_id] * size)]
    missing = (num_groups - len(whole)) * size
    if missing and (not may_split or len(left) < missing):
        return None
    return [node_id for node_id in whole for _ in range(size)] + left[:missing]


def _check_indices(
    grid: Grid,
    demand: Demand,
    indices: Sequence[int],
    bundles: Sequence[Bundle],
    fit: Mapping[int, Bundle],
    table: str,
) -> None:
    found = {bundle.index: bundle for bundle in bundles}
    if len(indices) != grid.world_size:
        raise PlacementError(f"{len(indices)} bundle indices are given for {grid.world_size} ranks", table)
    for rank, index in enumerate(indices):
        if index not in found:
            raise PlacementError(f"rank {rank} is to be in bundle {index}, which the placement group has not", table)
        if indices.index(index) != rank:
            raise PlacementError(f"rank {indices.index(index)} and rank {rank} are both to be in bundle {index}", table)
    for rank, index in enumerate(indices):
        if index not in fit:
            raise PlacementError(
                f"rank {rank} is to be in bundle {index}, which has {_number(found[index].free)} {demand.resource} "
                f"left, and a rank needs {_number(demand.per_rank)}",
                table,
            )


def _check_groups(grid: Grid, places: Sequence[Place], names: Mapping[str, str], may_split: bool, table: str) -> None:
    split = () if may_split else split_groups(grid, places)
    if split:
        members = [place for place in places if _group_of(grid, place) == split[0]]
        where = ", ".join(f"rank {place.rank} on {names[place.node_id]}" for place in members)
        raise PlacementError(f"these bundles split a tensor-parallel group ({where}); {_HOW_TO_SPLIT}", table)


def _check_parts(grid: Grid, places: Sequence[Place], parts: Sequence[_Part], table: str) -> None:
    """Whether each replica is on the nodes of its part."""
    part_of = [part for part in parts for _ in range(part.num_replicas)]
    for place in places:
        replica = grid.coordinates(place.rank).replica
        part = part_of[replica]
        if place.node_id not in {node.node_id for node in part.nodes}:
            raise PlacementError(
                f"rank {place.rank} of replica {replica} is to be in bundle {place.bundle}, which is not {part.where}: "
                "data_parallel_size_local wants it there",
                table,
            )


_HOW_TO_SPLIT = "allow_split_tensor_parallel lets one span nodes, at the price of much slower steps"


def _complaint(
    grid: Grid,
    demand: Demand,
    parts: Sequence[_Part],
    room: Mapping[str, int],
    may_split: bool,
    *,
    in_bundles: bool = False,
) -> str:
    """Of the first part that has too little room."""
    part = next(part for part in parts if _fill(grid, part, room, may_split) is None)
    needed, held = _needed(grid, part), _held(grid, part, room)
    asked = f"{needed.ranks} ranks ({_sizes(grid)}) of {_number(demand.per_rank)} {demand.resource} each"
    where = "the placement group's bundles have" if in_bundles else "the cluster has"
    there = " there" if part.where else ""
    if part.where:
        replicas = f"{part.num_replicas} of {grid.data_parallel_size} replicas are to be {part.where}"
        asked = f"{replicas} (data_parallel_size_local): {asked}"
    if held.ranks < needed.ranks:
        return f"{asked} are asked for and {where} room for {held.ranks}{there}"
    advice = there if may_split else f"{there}; {_HOW_TO_SPLIT}"
    return (
        f"{asked} are asked for, those of a tensor-parallel group on one node: of {needed.groups} groups {where} room "
        f"for {held.groups}{advice}"
    )


class _Room(NamedTuple):
    """For ranks, and for whole tensor-parallel groups."""

    ranks: int
    groups: int


def _needed(grid: Grid, part: _Part) -> _Room:
    groups = part.num_replicas * grid.pipeline_parallel_size
    return _Room(groups * grid.tensor_parallel_size, groups)


def _held(grid: Grid, part: _Part, room: Mapping[str, int]) -> _Room:
    ranks = [room.get(node.node_id, 0) for node in part.nodes]
    return _Room(sum(ranks), sum(number // grid.tensor_parallel_size for number in ranks))


def _table(
    grid: Grid,
    demand: Demand,
    parts: Sequence[_Part],
    order: Sequence[Node],
    room: Mapping[str, int],
    bundles: Sequence[Bundle] | None = None,
) -> str:
    """What was asked for, what each node has and what is missing."""
    size, resource = grid.tensor_parallel_size, demand.resource
    rows: list[tuple[str, ...]] = [
        ("node", "address", f"{resource} free", f"{resource} in all", "room for ranks", f"groups of {size}")
    ]
    if bundles is not None:
        rows[0] = (*rows[0], "bundles (free)")
    for node in order:
        has_room = room.get(node.node_id, 0)
        mark = (" (driver)" if node.is_driver else "") + (" (avoided)" if node.is_avoided else "")
        row: tuple[str, ...] = (f"{node.name}{mark}", node.address, _number(node.free), _number(node.total))
        row = (*row, str(has_room), str(has_room // size))
        if bundles is not None:
            held = [f"{b.index} ({_number(b.free)})" for b in bundles if b.node_id == node.node_id]
            row = (*row, " ".join(held) or "none")
        rows.append(row)
    need = _number(grid.world_size * demand.per_rank)
    rows.append(("asked for", "", need, "", str(grid.world_size), str(grid.num_groups)))
    sides = [(_needed(grid, part), _held(grid, part, room)) for part in parts]
    ranks = sum(max(needed.ranks - held.ranks, 0) for needed, held in sides)
    groups = sum(max(needed.groups - held.groups, 0) for needed, held in sides)
    rows.append(("missing", "", "", "", str(ranks), str(groups)))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, indented by two spaces."""
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(max(map(len, rows)))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _sizes(grid: Grid) -> str:
    sizes = f"tensor_parallel_size {grid.tensor_parallel_size}, pipeline_parallel_size {grid.pipeline_parallel_size}"
    return sizes if grid.data_parallel_size == 1 else f"{sizes}, data_parallel_size {grid.data_parallel_size}"


def _number(value: float) -> str:
    return f"{value:.4g}"
