"""Room on a cluster's nodes for replicas that run apart: one after the other, each in what those before leave. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from phalanx.errors import PlacementError
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Demand, Node, Place, place_ranks


class Wanted(NamedTuple):
    """One replica, as an engine of its own."""

    grid: Grid
    num_local: int | None = None
    """As for `place_ranks`."""


class Fit(NamedTuple):
    """What there is room for."""

    num_replicas: int
    """The first so many."""
    complaint: str | None
    """Why not for the next one: what it takes, and what each node has left. None if there is room for all."""


def fit_apart(wanted: Sequence[Wanted], demand: Demand, nodes: Sequence[Node], *, may_split: bool) -> Fit:
    """How many of these replicas the nodes can hold besides what they have."""
    for number, replica in enumerate(wanted):
        try:
            places = place_ranks(replica.grid, demand, nodes, may_split=may_split, num_local=replica.num_local)
        except PlacementError as error:
            return Fit(number, f"{error.complaint}; {_told(demand, nodes)}")
        nodes = _without(demand, nodes, places)
    return Fit(len(wanted), None)


def _without(demand: Demand, nodes: Sequence[Node], places: Sequence[Place]) -> list[Node]:
    taken = Counter(place.node_id for place in places)
    return [node._replace(free=node.free - taken[node.node_id] * demand.per_rank) for node in nodes]


def _told(demand: Demand, nodes: Sequence[Node]) -> str:
    each = (
        f"{node.name} {node.free:.4g} of {node.total:.4g}{' (avoided)' if node.is_avoided else ''}"
        for node in sorted(nodes, key=lambda node: node.name)
    )
    return f"{demand.resource} free: {', '.join(each) or 'no node'}"
