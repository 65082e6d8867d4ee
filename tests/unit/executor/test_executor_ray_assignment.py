"""Local ranks, device ids and addresses from what actors say. Needs no Ray that runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("ray")

from phalanx import __version__
from phalanx.config import ClusterConfig
from phalanx.errors import ConfigError, PlacementError, StartError
from phalanx.executor.ray.assignment import PlacedRank, address_of, assign
from phalanx.executor.ray.environment import NOT_FOR_WORKERS, environment_for_workers, runtime_env
from phalanx.executor.ray.messages import Introduction
from phalanx.topology.grid import Grid
from phalanx.topology.placement import Node, Place
from phalanx.transport.interfaces import InterfaceAddress

DOCUMENT = Path(__file__).parents[3] / "docs" / "ray.md"

NODES = {
    "a": Node("a", "host-a", "10.0.0.1", 4, 4, is_driver=True),
    "b": Node("b", "host-b", "10.0.0.2", 4, 4),
}
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}


def said(node: str, *devices: str, release: str | None = None) -> Introduction:
    return Introduction(
        node_id=node,
        host=f"host-{node}",
        pid=1,
        raylet_pid=2,
        log="/log",
        version=release or __version__,
        devices=devices,
        addresses=(),
        nicer_than_raylet=0,
    )


def assigned(*introductions: Introduction, homes: str) -> tuple[PlacedRank, ...]:
    places = [Place(rank, home, rank) for rank, home in enumerate(homes)]
    return assign(Grid(len(homes), 1), places, introductions, NODES, ADDRESSES)


def test_local_ranks_and_devices_are_of_each_node() -> None:
    ranks = assigned(said("a", "3"), said("b", "0"), said("a", "10"), said("a", "1"), homes="abaa")
    assert [(rank.node, rank.local_rank, rank.ranks_on_host) for rank in ranks] == [
        ("host-a", 0, 3),
        ("host-b", 0, 1),
        ("host-a", 1, 3),
        ("host-a", 2, 3),
    ]
    assert ranks[0].devices == ranks[2].devices == ("1", "3", "10")
    assert ranks[1].devices == ("0",)
    assert [rank.address for rank in ranks] == ["10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.1"]


def test_ranks_on_the_cpu_have_no_devices() -> None:
    assert assigned(said("a"), said("a"), homes="aa")[1].devices == ()


def test_two_ranks_on_one_device_are_an_error_that_names_them() -> None:
    with pytest.raises(PlacementError, match=r"GPU 0 of host-a to more than one rank") as caught:
        assigned(said("a", "0"), said("a", "0"), homes="aa")
    assert caught.value.table.split() == ["rank", "on", "host-a", "GPU", "0", "0", "1", "0"]


def test_an_actor_elsewhere_is_an_error() -> None:
    with pytest.raises(StartError, match="rank 0 did not start: it should be on host-a and is on host-b"):
        assigned(said("b"), homes="a")


def test_another_version_is_an_error() -> None:
    with pytest.raises(StartError, match=r"host-a has Phalanx 0\.0\.0, the driver has"):
        assigned(said("a", release="0.0.0"), homes="a")


def test_addresses_of_interfaces() -> None:
    held = [
        InterfaceAddress("eth0", "10.0.0.1"),
        InterfaceAddress("eth1", "fe80::1"),
        InterfaceAddress("eth1", "fd00::1"),
        InterfaceAddress("eth2", "192.168.0.1"),
        InterfaceAddress("eth2", "fd01::1"),
        InterfaceAddress("eth3", "fe80::3"),
    ]
    assert address_of(NODES["a"], held, None) == "10.0.0.1"
    assert address_of(NODES["a"], held, "eth1") == "fd00::1"
    assert address_of(NODES["a"], held, "eth2") == "192.168.0.1"
    assert address_of(NODES["a"]._replace(address="fd00::9"), held, "eth2") == "fd01::1"
    assert address_of(NODES["a"], held, "eth2", 6) == "fd01::1"
    assert address_of(NODES["a"], held, None, 4) == "10.0.0.1"
    assert address_of(NODES["a"], [*held, InterfaceAddress("eth0", "fd09::1")], None, 6) == "fd09::1"
    with pytest.raises(ConfigError, match=r"node_address: 'IPv6' .* host-a has no IPv6 address on eth0"):
        address_of(NODES["a"], held, None, 6)
    for interface in ("eth3", "eth9"):
        with pytest.raises(ConfigError, match=r"host-a has eth0, eth1, eth2, eth3") as caught:
            address_of(NODES["a"], held, interface)
        assert caught.value.field == "network_interface"


def test_what_of_the_environment_goes_to_workers() -> None:
    driver = {"NCCL_DEBUG": "INFO", "HF_HOME": "/models", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0"}
    kept_back = {"PHALANX_API_KEY": "secret", "NCCL_SOCKET_IFNAME": "eth0", "RAY_AUTH_TOKEN": "t", "LOCAL_RANK": "1"}
    assert environment_for_workers({**driver, **kept_back}) == {"NCCL_DEBUG": "INFO", "HF_HOME": "/models"}


@pytest.mark.parametrize("name", sorted(NOT_FOR_WORKERS))
def test_what_the_driver_keeps_is_documented(name: str) -> None:
    assert environment_for_workers({name: "1"}) == {}
    assert f"`{name}`" in DOCUMENT.read_text()


def test_the_runtime_environment_is_merged() -> None:
    assert runtime_env(ClusterConfig()) is None
    given = {"env_vars": {"A": "1"}}
    cluster = ClusterConfig(ray_runtime_env=given, ray_workers_use_nsight=True)
    merged = runtime_env(cluster)
    assert merged is not None
    assert merged["env_vars"] == {"A": "1"}
    assert merged["nsight"]["cuda-graph-trace"] == "node"
    assert given == {"env_vars": {"A": "1"}}
    own = msgspec.structs.replace(cluster, ray_runtime_env={"nsight": "default"})
    assert runtime_env(own) == {"nsight": "default"}
