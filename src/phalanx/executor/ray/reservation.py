"""Bundles for the ranks: of a placement group that exists, or made for this run on the nodes that we chose."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import msgspec
import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from phalanx.config import Config
from phalanx.errors import ConfigError, PlacementError
from phalanx.executor.ray.connection import Connection
from phalanx.executor.ray.probe import answers
from phalanx.executor.ray.shared_bundle import SharedBundle
from phalanx.topology.grid import Grid
from phalanx.topology.placement import (
    Bundle,
    Demand,
    Node,
    Place,
    aligned,
    avoiding,
    place_in_bundles,
    place_ranks,
)

SETTLE_S = 3.0
"""What a run or its user has just let go of, or made, shows after a moment only."""
POLL_S = 0.05
COLLISION_S = 0.5
"""Two engines that have each taken a part of what both need let go, and begin again at different times within this."""
NEXT_TO_NOTHING = 1e-4
"""Ray counts in ten thousandths."""

CREATED = "CREATED"

log = logging.getLogger("phalanx.executor")


class Reservation(NamedTuple):
    """A bundle for each rank."""

    places: tuple[Place, ...]
    bundles: tuple[SharedBundle, ...]
    """In rank order."""
    nodes: Mapping[str, Node]
    """By their ids."""
    demand: Demand


def reserve(
    connection: Connection,
    config: Config,
    grid: Grid,
    device: str,
    ownership: ExitStack,
    *,
    beside: Sequence[SharedBundle] = (),
    shares: bool = True,
) -> Reservation:
    """Find a bundle for each rank: in the placement group that the configuration names, in the current one, or one that
    is made for it and goes with `ownership`.

    `beside` are those of ranks that the new ones are to take over from. With `shares` they have them too, if they are
    ours, and what is new is only what is missing then.

    Raises PlacementError if the ranks do not fit, at once if they would not fit into the cluster even if it were empty;
    ConfigError.
    """
    demand = Demand.on(device, config.cluster.ray_per_worker_gpus)
    is_in_existing = bool(beside) and not beside[0].is_ours
    existing = beside[0].group if is_in_existing else _existing(config)
    if existing is not None:
        return _settled(lambda: _in_existing(connection, config, grid, demand, existing))
    shared = beside if shares else ()
    return _settled(lambda: _in_new(connection, config, grid, demand, ownership, shared))


def _settled(attempt: Callable[[], Reservation]) -> Reservation:
    """The first attempt that succeeds; the failure of the last one after `SETTLE_S`, or one that time will not cure."""
    expires_at = time.monotonic() + SETTLE_S
    while True:
        is_last = time.monotonic() >= expires_at
        try:
            return attempt()
        except _NotYetError as error:
            if is_last:
                raise error.failure from None
        time.sleep(POLL_S)


class _NotYetError(Exception):
    """It may be different in a moment."""

    def __init__(self, failure: PlacementError) -> None:
        self.failure = failure


def _in_new(
    connection: Connection,
    config: Config,
    grid: Grid,
    demand: Demand,
    ownership: ExitStack,
    beside: Sequence[SharedBundle],
) -> Reservation:
    if config.cluster.ray_bundle_indices is not None:
        allowed = "only with a placement group that exists"
        raise ConfigError("ray_bundle_indices", config.cluster.ray_bundle_indices, allowed)
    choose = partial(
        place_ranks,
        grid,
        demand,
        may_split=config.cluster.allow_split_tensor_parallel,
        num_local=config.parallel.data_parallel_size_local,
    )
    own = Counter(bundle.node_id for bundle in beside)
    nodes = [
        node._replace(free=node.free + own[node.node_id] * demand.per_rank)
        for node in avoiding(connection.nodes(demand.resource), config.cluster.avoid_nodes)
    ]
    try:
        places = choose(nodes)
    except PlacementError as error:
        emptied = [node._replace(free=node.total) for node in nodes]
        if _succeeds(lambda: choose(emptied)):
            raise _NotYetError(error) from error
        raise
    with ExitStack() as undo:
        bundles = _claim(places, demand, beside, undo)
        if not all(bundle.is_shared or bundle.group.wait(SETTLE_S) for bundle in bundles):
            undo.close()
            time.sleep(random.uniform(0.0, COLLISION_S))
            complaint = "what the ranks need was taken by somebody else in this moment"
            raise _NotYetError(PlacementError(complaint, _free_table(demand, nodes)))
        ownership.push(undo.pop_all())
    return Reservation(places, bundles, {node.node_id: node for node in nodes}, demand)


def _claim(
    places: Sequence[Place], demand: Demand, beside: Sequence[SharedBundle], undo: ExitStack
) -> tuple[SharedBundle, ...]:
    """A bundle for each, which goes with `undo`: one of those beside while there are any on its node, else a new one,
    which Ray may still be making.

    Each is a placement group, so that each can be given back: Ray cannot take a bundle out of a group.
    """
    left = list(beside)
    bundles: list[SharedBundle] = []
    undo.callback(_let_go, bundles)
    for place in places:
        bundle = next((bundle for bundle in left if bundle.node_id == place.node_id and bundle.share()), None)
        if bundle is None:
            bundle = _asked_for(place, demand)
        else:
            left.remove(bundle)
        bundles.append(bundle)
    return tuple(bundles)


def _asked_for(place: Place, demand: Demand) -> SharedBundle:
    group = placement_group(
        [{demand.resource: demand.per_rank}], bundle_label_selector=[{"ray.io/node-id": place.node_id}]
    )
    return SharedBundle(group, 0, place.node_id, is_ours=True)


def _let_go(bundles: Sequence[SharedBundle]) -> None:
    """Give those back that nobody else has."""
    _remove([bundle.group for bundle in bundles if bundle.let_go()])


def busy_places(connection: Connection, reservation: Reservation) -> list[Place]:
    """Those whose bundle an actor has that is still ending, as far as Ray's head knows by now."""
    demand, free = reservation.demand, connection.free()

    def is_free(bundle: SharedBundle) -> bool:
        left = free.get(bundle.node_id, {}).get(bundle.resource(demand.resource), 0.0)
        return left >= demand.per_rank - NEXT_TO_NOTHING

    return [place for place in reservation.places if not is_free(reservation.bundles[place.rank])]


def _remove(groups: Sequence[PlacementGroup]) -> None:
    if not groups or not ray.is_initialized():  # Ray is gone, and the call would start another one
        return
    head = ray.get_runtime_context().gcs_address
    if not answers(head):  # the call would not return before Ray ends this process
        log.warning("Ray's head at %s does not answer: placement groups end only with this process's job", head)
        return
    for group in groups:
        remove_placement_group(group)


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except PlacementError:
        return False
    return True


def _in_existing(
    connection: Connection, config: Config, grid: Grid, demand: Demand, group: PlacementGroup
) -> Reservation:
    nodes = avoiding(connection.nodes(demand.resource), config.cluster.avoid_nodes)
    entry = placement_group_table(group)
    if entry.get("state") != CREATED:
        complaint = f"the placement group {_name_of(group, entry)} is {entry.get('state', 'unknown')}, not {CREATED}"
        raise _NotYetError(PlacementError(complaint, _bundle_table(entry)))
    bundles = _bundles(connection, demand, group, entry, nodes)
    choose = partial(
        place_in_bundles,
        grid,
        demand,
        nodes,
        indices=config.cluster.ray_bundle_indices,
        may_split=config.cluster.allow_split_tensor_parallel,
        num_local=config.parallel.data_parallel_size_local,
    )
    try:
        places = choose(bundles)
    except PlacementError as error:
        if _succeeds(lambda: choose([_emptied(bundle, entry, demand) for bundle in bundles])):
            raise _NotYetError(error) from error
        raise
    shared = tuple(SharedBundle(group, place.bundle, place.node_id) for place in places)
    return Reservation(places, shared, {node.node_id: node for node in nodes}, demand)


def _bundles(
    connection: Connection, demand: Demand, group: PlacementGroup, entry: Mapping[str, Any], nodes: Sequence[Node]
) -> list[Bundle]:
    """Those on nodes that live."""
    alive = {node.node_id for node in nodes}
    homes: Mapping[int, str] = entry["bundles_to_node_id"]
    return [
        Bundle(index, home, _free_in_bundle(connection, demand, group, entry, index))
        for index, home in sorted(homes.items())
        if home in alive
    ]


def _emptied(bundle: Bundle, entry: Mapping[str, Any], demand: Demand) -> Bundle:
    return msgspec.structs.replace(bundle, free=entry["bundles"][bundle.index].get(demand.resource, 0.0))


def _free_in_bundle(
    connection: Connection, demand: Demand, group: PlacementGroup, entry: Mapping[str, Any], index: int
) -> float:
    if not entry["bundles"][index].get(demand.resource):
        return 0.0
    bundle = SharedBundle(group, index, entry["bundles_to_node_id"][index])
    return connection.free_on(bundle.node_id, bundle.resource(demand.resource))


def _existing(config: Config) -> PlacementGroup | None:
    wanted = config.cluster.placement_group
    if wanted is None:
        return get_current_placement_group()
    table: Mapping[str, Mapping[str, Any]] = placement_group_table()
    living = {key: entry for key, entry in table.items() if entry["state"] != "REMOVED"}
    matches = [key for key, entry in living.items() if wanted in (key, entry["name"])]
    if len(matches) != 1:
        known = ", ".join(f"{entry['name'] or 'unnamed'} ({key})" for key, entry in living.items()) or "none"
        reason = "there is none of this name or id" if not matches else "several have this name, give the id"
        raise ConfigError("placement_group", wanted, f"{reason}; placement groups: {known}")
    return PlacementGroup(PlacementGroupID.from_hex(matches[0]))


def _name_of(group: PlacementGroup, entry: Mapping[str, Any]) -> str:
    return entry.get("name") or group.id.hex()


def _bundle_table(entry: Mapping[str, Any]) -> str:
    rows = [("bundle", "asked for", "node")]
    for index, resources in sorted(entry.get("bundles", {}).items()):
        asked = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        rows.append((str(index), asked, entry.get("bundles_to_node_id", {}).get(index) or "none yet"))
    return aligned(rows)


def _free_table(demand: Demand, nodes: Sequence[Node]) -> str:
    rows = [("node", f"{demand.resource} free", f"{demand.resource} in all")]
    rows += [(node.name, f"{node.free:g}", f"{node.total:g}") for node in nodes]
    return aligned(rows)
