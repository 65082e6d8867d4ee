"""The connection to Ray: the one that is there, a cluster's, or a Ray of our own on this host."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import ray
import ray.exceptions
from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR
from ray._private.ray_logging import stdout_deduplicator
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]  # compiled

from phalanx.config import ClusterConfig
from phalanx.errors import ConfigError, StartError
from phalanx.executor.platform import num_cores
from phalanx.executor.ray.discovery import find_ray
from phalanx.executor.ray.private_ray import Keeper, start_private_ray
from phalanx.executor.ray.probe import NoRayError, get_ready_for
from phalanx.topology.placement import Node

LOCAL = "local"
EVERYTHING = re.compile("")
HOST_AND_PORT = re.compile(r"(\[.+\]|[^:/]+):\d+")

_lock = threading.Lock()
_num_users = 0
"""Of the connection that this module made: the last one ends it."""
_teardown = ExitStack()
"""Ends that connection, whatever there is of it."""
_keeper = Keeper()
"""Of a Ray of our own."""


class Connection:
    """This process's connection to Ray, while it is open. A connection that was there before stays."""

    def __init__(self, ownership: ExitStack) -> None:
        """Use `connect`."""
        self._ownership = ownership
        self.node_id: str = ray.get_runtime_context().get_node_id()
        """The node that this process is on."""

    def nodes(self, resource: str) -> list[Node]:
        """The nodes that live, and what they have of `resource`, as Ray knows it: a moment old."""
        return nodes_with(resource, lambda node: bool(node["NodeID"] == self.node_id))

    def free(self) -> Mapping[str, Mapping[str, float]]:
        """What each node has free of every resource, also of those of placement groups' bundles, by node id."""
        return _free()

    def free_on(self, node_id: str, resource: str) -> float:
        """What a node has free of any resource, also one of a placement group's bundle."""
        return float(self.free().get(node_id, {}).get(resource, 0.0))

    def close(self) -> None:
        """Let go of the connection. May be called more than once."""
        self._ownership.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def nodes_with(resource: str, is_driver: Callable[[Mapping[str, Any]], bool]) -> list[Node]:
    """As Connection.nodes. `is_driver` tells the driver's node from Ray's entry of it."""
    free = _free()
    # As ray.nodes(), which joins the cluster if this process has not: a reader has not.
    alive = [node for node in ray._private.state.state.node_table() if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    return [
        Node(
            node_id=node["NodeID"],
            name=_node_name(node["NodeManagerHostname"], node["NodeID"], hosts),
            address=node["NodeManagerAddress"],
            total=node["Resources"].get(resource, 0.0),
            free=free.get(node["NodeID"], {}).get(resource, 0.0),
            is_driver=is_driver(node),
        )
        for node in alive
    ]


def _free() -> Mapping[str, Mapping[str, float]]:
    # Ray has no public call for what is free; this is the one that its own libraries use.
    free: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    return free


def _node_name(host: str, node_id: str, hosts: Counter[str]) -> str:
    """The host's name, unless several nodes have it."""
    return host if hosts[host] == 1 else f"{host}-{node_id[:6]}"


def connect(cluster: ClusterConfig, *, num_ranks: int) -> Connection:
    """Connect to Ray; `num_ranks` is how many a Ray of our own must have room for on the CPU.

    Raises ConfigError if there is no Ray at the address or it does not let us in; StartError. Nothing has changed then.
    """
    global _num_users
    asked = cluster.ray_address
    if asked is not None:
        _check_format(asked)
    with _lock, ExitStack() as undo:
        ownership = ExitStack()
        if _num_users or not ray.is_initialized():
            _num_users += 1
            undo.callback(_let_go)
            ownership.callback(_release)
            if _num_users == 1:
                _initialize(cluster, num_ranks)
        if asked is not None:
            _check_same(asked)
        connection = Connection(ownership)
        undo.pop_all()
        return connection


def _check_format(address: str) -> None:
    if address != LOCAL and not HOST_AND_PORT.fullmatch(address):
        raise ConfigError("ray_address", address, "HOST:PORT of a Ray cluster that this host is a node of, or local")


def _check_same(address: str) -> None:
    """Whether the Ray that this process is connected to is the one that was asked for."""
    connected_to = ray.get_runtime_context().gcs_address
    if address == LOCAL:
        if not _keeper.is_hired:
            complaint = f"this process is connected already, to the Ray at {connected_to}, which is not one of its own"
            raise ConfigError("ray_address", address, complaint)
    elif canonicalize_bootstrap_address(address) != connected_to:
        raise ConfigError("ray_address", address, f"this process is connected to the Ray at {connected_to} already")


def _release() -> None:
    with _lock:
        _let_go()


def _let_go() -> None:
    """With the lock held."""
    global _num_users
    _num_users -= 1
    if not _num_users:
        _teardown.close()


def _initialize(cluster: ClusterConfig, num_ranks: int) -> None:
    """What is begun here is ended by `_teardown`, also if it fails."""
    _teardown.callback(_keeper.dismiss)
    _teardown.callback(_restore_auth_mode, os.environ.get(AUTH_MODE_ENV_VAR))
    _teardown.callback(_unmute)
    _teardown.callback(ray.shutdown)
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = cluster.ray_address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != LOCAL:
        _check_format(address)
        get_ready_for(address)
        _join(address)
    elif address == LOCAL or not _join_running():
        _start_own(cluster, num_ranks)


def _join_running() -> bool:
    """Connect to the Ray that runs on this host; False if there is none."""
    address = find_ray()
    if address is None:
        return False
    try:
        get_ready_for(address)
    except NoRayError:  # it has just ended
        return False
    _join(address)
    return True


def _join(address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError("ray_address", address, _first_line(error)) from error
    _mute()


def _start_own(cluster: ClusterConfig, num_ranks: int) -> None:
    """A Ray for this process alone, with enough of Ray's CPUs for the ranks as `local` would run them."""
    num_cpus = max(num_cores(), -int(-num_ranks * cluster.ray_per_worker_gpus // 1))
    try:
        start_private_ray(num_cpus, _keeper)
    except (RuntimeError, OSError, ValueError) as error:
        raise StartError("Ray", "starting", _first_line(error)) from error
    _mute()


def _mute() -> None:
    """Ray prints pages about its processes' ends to stdout, and cannot be told not to. We say it in our words."""
    stdout_deduplicator.skip_re = EVERYTHING


def _unmute() -> None:
    stdout_deduplicator.skip_re = None  # type: ignore[assignment]  # as it is at first


def _restore_auth_mode(mode: str | None) -> None:
    """`mode` is the user's own word on whether Ray's tokens are used. Ray leaves what a connection came to where that
    is read: the next Ray may have no tokens, and would lose the actors of a client that sends one.
    """
    if mode is None:
        os.environ.pop(AUTH_MODE_ENV_VAR, None)
    else:
        os.environ[AUTH_MODE_ENV_VAR] = mode
    RayConfig.initialize("")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
