"""From actors that have introduced themselves to ranks that know their place: pure arithmetic."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import msgspec

from phalanx.errors import ConfigError, PlacementError, StartError
from phalanx.executor.ray.messages import Introduction
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Node, Place, aligned
from phalanx.transport.interfaces import InterfaceAddress
from phalanx.version import __version__


class PlacedRank(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's place, as it is."""

    rank: int
    replica: int
    stage: int
    tp_rank: int
    node: str
    node_id: str
    address: str
    """Where the other nodes reach this one."""
    bundle: int
    local_rank: int
    """Index into `devices`."""
    ranks_on_host: int
    devices: tuple[str, ...]
    """Physical ids of all devices that this run has on the node; none on the CPU."""
    is_driver_node: bool
    pid: int
    log: str


def assign(
    grid: Grid,
    places: Sequence[Place],
    introductions: Sequence[Introduction],
    nodes: Mapping[str, Node],
    addresses: Mapping[str, str],
) -> tuple[PlacedRank, ...]:
    """Put together what was planned and what actors say, in rank order.

    Devices go to the ranks of a node in ascending order. Raises StartError when an actor is not where it should be or
    of another version; PlacementError when two ranks would share a device.
    """
    for place, said in zip(places, introductions, strict=True):
        _check(place, said, nodes)
    on_node = {
        node_id: [place.rank for place in places if place.node_id == node_id]
        for node_id in {place.node_id for place in places}
    }
    devices = {
        node_id: sorted((device for rank in ranks for device in introductions[rank].devices), key=_by_number)
        for node_id, ranks in on_node.items()
    }
    for node_id, ranks in on_node.items():
        _check_devices(ranks, devices[node_id], nodes[node_id])
    return tuple(
        PlacedRank(
            rank=place.rank,
            **grid.coordinates(place.rank)._asdict(),
            node=nodes[place.node_id].name,
            node_id=place.node_id,
            address=addresses[place.node_id],
            bundle=place.bundle,
            local_rank=on_node[place.node_id].index(place.rank),
            ranks_on_host=len(on_node[place.node_id]),
            devices=tuple(devices[place.node_id]),
            is_driver_node=nodes[place.node_id].is_driver,
            pid=introductions[place.rank].pid,
            log=introductions[place.rank].log,
        )
        for place in places
    )


def address_of(
    node: Node, addresses: Sequence[InterfaceAddress], interface: str | None, version: int | None = None
) -> str:
    """Where others reach a node that has these addresses: Ray's own, or one of `interface` and IP `version` if given.

    Without `version` it is of the same one as Ray's own if there is one. Raises ConfigError when the node has none.
    """
    own_version = ipaddress.ip_address(node.address).version
    if interface is None and version in (None, own_version):
        return node.address
    name = interface or next((entry.interface for entry in addresses if entry.address == node.address), None)
    found = [entry.address for entry in addresses if entry.interface == name]
    usable = [address for address in found if not ipaddress.ip_address(address).is_link_local]
    fitting = [address for address in usable if ipaddress.ip_address(address).version == (version or own_version)]
    if fitting:
        return fitting[0]
    if version is not None:
        allowed = f"an address of the same kind as the nodes have: {node.name} has no IPv{version} address on {name}"
        raise ConfigError("node_address", f"IPv{version}", allowed)
    if not usable:
        known = ", ".join(sorted({entry.interface for entry in addresses}))
        allowed = f"an interface with an address on every node; {node.name} has {known}"
        raise ConfigError("network_interface", interface, allowed)
    return usable[0]


def _check(place: Place, said: Introduction, nodes: Mapping[str, Node]) -> None:
    if said.node_id != place.node_id:
        planned = nodes[place.node_id].name
        raise StartError(f"rank {place.rank}", "placing", f"it should be on {planned} and is on {said.host}")
    if said.version != __version__:
        cause = f"{said.host} has Phalanx {said.version}, the driver has {__version__}"
        raise StartError(f"rank {place.rank}", "placing", cause)


def _check_devices(ranks: Sequence[int], devices: Sequence[str], node: Node) -> None:
    if len(set(devices)) == len(devices):
        return
    shared = sorted({device for device in devices if devices.count(device) > 1}, key=_by_number)
    rows = [("rank on " + node.name, "GPU")] + [
        (str(rank), device) for rank, device in zip(ranks, devices, strict=True)
    ]
    raise PlacementError(
        f"Ray has given GPU {', '.join(shared)} of {node.name} to more than one rank: at a ray_per_worker_gpus "
        "of one half or less a node can have one rank; raise it, or give a placement group with a bundle on each GPU",
        aligned(rows),
    )


def _by_number(device: str) -> tuple[bool, int, str]:
    return (not device.isdigit(), int(device) if device.isdigit() else 0, device)
