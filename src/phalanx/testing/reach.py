"""How the processes of ranks are found and killed, wherever they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from phalanx.testing.holdings import children_of, command_of, parent_of

_ACTOR, _OF_RAY = b"ray::RankActor", b"ray::"


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
        """Children of the same parent. Raises ProcessLookupError."""
        parent = parent_of(one.pid)
        if parent is None:
            raise ProcessLookupError(f"process {one.pid} is gone")
        return lambda: [Place(one.node, pid) for pid in children_of(parent) if is_rank(command_of(pid))]

    def agents(self) -> Sequence[Place]:
        """None: it is the engine's process that holds it."""
        return ()

    def kill(self, place: Place) -> None:
        os.kill(place.pid, signal.SIGKILL)


def is_rank(command: bytes) -> bool:
    """Whether a process with this command line may be one: Ray has others besides."""
    return not command.startswith(_OF_RAY) or command.startswith(_ACTOR)
