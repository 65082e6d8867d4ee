"""Bundles for the ranks: of a placement group that exists, or of one made for this run on the nodes that we chose."""

from __future__ import annotations

import logging
import time
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
NEXT_TO_NOTHING = 1e-4
"""Ray counts in ten thousandths."""

CREATED = "CREATED"

log = logging.getLogger("phalanx.executor")


class Reservation(NamedTuple):
    """A bundle for each rank."""

    group: PlacementGroup
    places: tuple[Place, ...]
    nodes: Mapping[str, Node]
    """By their ids."""
    demand: Demand


def reserve(connection: Connection, config: Config, grid: Grid, device: str, ownership: ExitStack) -> Reservation:
    """Find a bundle for each rank, in the placement group that the configuration names, in the current one, or in a new
    one, which goes with `ownership`.

    Raises PlacementError if the ranks do not fit, at once if they would not fit into the cluster even if it were empty;
    ConfigError.
    """
    demand = Demand.on(device, config.cluster.ray_per_worker_gpus)
    existing = _existing(config)
    if existing is not None:
        return _settled(lambda: _in_existing(connection, config, grid, demand, existing))
    return _settled(lambda: _in_new(connection, config, grid, demand, ownership))


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


def _in_new(connection: Connection, config: Config, grid: Grid, demand: Demand, ownership: ExitStack) -> Reservation:
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
    nodes = avoiding(connection.nodes(demand.resource), config.cluster.avoid_nodes)
    try:
        places = choose(nodes)
    except PlacementError as error:
        emptied = [node._replace(free=node.total) for node in nodes]
        if _succeeds(lambda: choose(emptied)):
            raise _NotYetError(error) from error
        raise
    group = placement_group(
        [{demand.resource: demand.per_rank} for _ in places],
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": place.node_id} for place in places],
    )
    with ExitStack() as undo:
        undo.callback(_remove, group)
        if not group.wait(SETTLE_S):
            complaint = "what the ranks need was taken by somebody else in this moment"
            raise _NotYetError(PlacementError(complaint, _free_table(demand, nodes)))
        ownership.push(undo.pop_all())
    return Reservation(group, places, {node.node_id: node for node in nodes}, demand)


def busy_places(connection: Connection, reservation: Reservation) -> list[Place]:
    """Those whose bundle an actor has that is still ending, as far as Ray's head knows by now."""
    demand, group_id, free = reservation.demand, reservation.group.id.hex(), connection.free()

    def is_free(place: Place) -> bool:
        resource = f"{demand.resource}_group_{place.bundle}_{group_id}"
        return free.get(place.node_id, {}).get(resource, 0.0) >= demand.per_rank - NEXT_TO_NOTHING

    return [place for place in reservation.places if not is_free(place)]


def _remove(group: PlacementGroup) -> None:
    if not ray.is_initialized():  # it is gone, and the call would start another Ray
        return
    head = ray.get_runtime_context().gcs_address
    if not answers(head):  # the call would not return before Ray ends this process
        log.warning("Ray's head at %s does not answer: a placement group ends only with this process's job", head)
        return
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
    return Reservation(group, places, {node.node_id: node for node in nodes}, demand)


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
    return connection.free_on(entry["bundles_to_node_id"][index], f"{demand.resource}_group_{index}_{group.id.hex()}")


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
