"""How the processes of ranks are found and killed, wherever they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from phalanx.testing.holdings import children_of, command_of, parent_of

_ACTOR = b"ray::RankActor"


class Place(NamedTuple):
    """A process: `pid` is of its own node."""

    node: str
    pid: int


class Reach(Protocol):
    """To all nodes of an engine."""

    def ranks_beside(self, one: Place) -> Callable[[], Sequence[Place]]:
        """What tells all ranks that there are, of all lines, also when `one` is gone by then. Each call looks anew."""

    def agents(self) -> Sequence[Place]:
        """The processes that hold the memory of nodes."""

    def kill(self, place: Place) -> None:
        """With SIGKILL. Raises ProcessLookupError if it is gone."""


class ThisHost:
    """Ranks that one process has started, and actors of a Ray that has no other node."""

    def ranks_beside(self, one: Place) -> Callable[[], Sequence[Place]]:
        """Children of the same fork server, or with Ray of those of all actors. Raises ProcessLookupError."""
        server = _parent_of(one.pid)
        actor = _parent_of(server)
        if not is_actor(actor):
            return lambda: [Place(one.node, pid) for pid in children_of(server)]
        raylet = _parent_of(actor)
        return lambda: [Place(one.node, pid) for pid in _forked_under(raylet)]

    def agents(self) -> Sequence[Place]:
        """None: it is the engine's process that holds it."""
        return ()

    def kill(self, place: Place) -> None:
        os.kill(place.pid, signal.SIGKILL)


def is_actor(pid: int) -> bool:
    """Whether a process is Ray's actor of a rank."""
    return command_of(pid).startswith(_ACTOR)


def _forked_under(raylet: int) -> Iterator[int]:
    """By the fork servers of all actors."""
    for actor in filter(is_actor, children_of(raylet)):
        for server in children_of(actor):
            yield from children_of(server)


def _parent_of(pid: int) -> int:
    parent = parent_of(pid)
    if parent is None:
        raise ProcessLookupError(f"process {pid} is gone")
    return parent
