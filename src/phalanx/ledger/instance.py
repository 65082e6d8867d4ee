"""What a running instance shows of itself (transport/beacon.py), so that others can find it and look at its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from phalanx.ledger.watch_order import WatchOrder
from phalanx.transport.beacon import Beacon, beacons, beacons_of
from phalanx.version import __version__

T = TypeVar("T")

BEACON = "instance"
SERVER_BEACON = "server"


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One engine: the process that holds the journals of its ranks."""

    pid: int
    start_time: int
    """Of the process, in clock ticks since boot."""
    parent_pid: int
    """Of the server, if there is one."""
    version: str
    model: str
    world_size: int
    layout: dict[str, int]
    """Sizes of the axes along which ranks are laid out, those of one left out."""
    launcher: str
    device: str
    epoch: int
    started_at: float
    """Seconds since 1970."""
    order: WatchOrder | None
    """Where the journals of its ranks on this host are; None if none are kept."""


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a server shows of itself."""

    version: str
    url: str
    model: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A process that shows an instance; None if another version of Phalanx runs there, whose layout is another."""

    pid: int
    instance: Instance | None


class _Version(msgspec.Struct):
    version: str


def show(instance: Instance) -> Beacon:
    """Be found from now on, until what is returned is closed."""
    return Beacon(BEACON, msgspec.msgpack.encode(instance))


def show_server(url: str, model: str) -> Beacon:
    """As `show`, of the process that listens."""
    return Beacon(SERVER_BEACON, msgspec.msgpack.encode(ServerFacts(version=__version__, url=url, model=model)))


def running() -> Iterator[Found]:
    """Every instance of this user on this host."""
    for pid, content in sorted(beacons(BEACON)):
        yield _found(pid, content)


def shown_by(pid: int) -> list[Found]:
    """What one process shows: several if it runs several models, nothing if it is no engine, or gone."""
    return [_found(pid, content) for content in beacons_of(pid, BEACON)]


def server_of(instance: Instance) -> ServerFacts | None:
    """The server in front of an instance, if there is one that can be read."""
    found = (_read(content, ServerFacts) for content in beacons_of(instance.parent_pid, SERVER_BEACON))
    return next((server for server in found if server is not None), None)


def _found(pid: int, content: bytes) -> Found:
    return Found(pid=pid, instance=_read(content, Instance))


def _read(content: bytes, kind: type[T]) -> T | None:
    try:
        if msgspec.msgpack.decode(content, type=_Version).version == __version__:
            return msgspec.msgpack.decode(content, type=kind)
    except msgspec.DecodeError:  # one of the same number, under development
        pass
    return None
