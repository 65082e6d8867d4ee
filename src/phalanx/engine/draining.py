"""Takes a fleet's ranks off a node of the cluster, for its maintenance: to other nodes, as far as they have room.

Replicas with a rank there are replaced as wholes. Others that are to take their places start first, so that nothing is
missing meanwhile; then those on the node leave as in any resize, their requests end or move. What had no room before
is tried again when they have left, as their bundles on other nodes are free by then. What finds none is missing from
now on, until there is room again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from phalanx.engine.awaiting import begun
from phalanx.engine.fleet_resizing import FleetResizing
from phalanx.engine.joining import Joining
from phalanx.engine.members import Members
from phalanx.engine.room import Room
from phalanx.errors import ConfigError, PhalanxError, RequestError, ResizeRefusedError, ResizeUnderWayError
from phalanx.topology.placement import Node

LOOK_S = 0.05
"""How often it is looked whether ranks that are just coming have their places."""

log = logging.getLogger("phalanx.engine")


class Draining:
    """Of one fleet: one node at a time, and no resize beside it."""

    def __init__(self, members: Members, joining: Joining, room: Room, resizing: FleetResizing) -> None:
        self._members = members
        self._roster = members.roster
        self._joining = joining
        self._room = room
        self._resizing = resizing
        self._node: str | None = None
        """That ranks are being taken off."""

    @property
    def drained(self) -> tuple[str, ...]:
        """Nodes that no rank is to come to."""
        return self._joining.config.cluster.avoid_nodes

    @property
    def is_under_way(self) -> bool:
        return self._node is not None

    def check_none(self) -> None:
        """Raises ResizeRefusedError."""
        if self._node is not None:
            raise ResizeRefusedError(f"node {self._node} is being drained: wait, or cancel it")

    async def begin(self, node: str, drain_timeout_s: float) -> asyncio.Task[None]:
        """As Engine.begin_drain."""
        self.check_none()
        if (resize := self._roster.resize) is not None:
            raise ResizeUnderWayError(str(resize.size_before), f"{resize.size_asked_for} replicas")
        self._check_known()
        self._node, avoided = node, self.drained
        try:
            found = await self._room.node_called(node)
            self._node = name = found.name
            self._avoid((*_others(avoided, found), name))
            await self._check_others(name)
            return await begun(self._carry_out(name, avoided, drain_timeout_s))
        except BaseException:
            self._node = None
            self._avoid(avoided)
            raise

    async def undo(self, node: str) -> None:
        """Let ranks come to a node again, whatever it was called when it was drained, or at the start.

        Raises what `check_none` and Room.node_called do. One that is not in the cluster just now has only the name that
        is given.
        """
        self.check_none()
        try:
            found = await self._room.node_called(node)
            self.check_none()  # finding it takes a second
            left = _others(self.drained, found)
        except RequestError:
            if node not in self.drained:
                raise
            left = tuple(known for known in self.drained if known != node)
        self._avoid(left)
        log.info("node %s is of use again", node)

    async def _carry_out(self, node: str, avoided: tuple[str, ...], drain_timeout_s: float) -> None:
        """If it fails, or is cancelled, all is as before."""
        try:
            while not self._is_left(node):
                if leaving := self._on(node):
                    await self._move(node, leaving, drain_timeout_s)
                else:
                    await asyncio.sleep(LOOK_S)
        except BaseException:
            self._avoid(avoided)
            raise
        finally:
            self._node = None
        log.info("node %s is drained: no rank is there any more", node)

    async def _move(self, node: str, leaving: Sequence[int], drain_timeout_s: float) -> None:
        size, because = self._roster.size, f"node {node} is drained"
        joining = self._roster.free_numbers((await self._fit_elsewhere(len(leaving)))[0])
        if joining:
            await self._resize(size + len(joining), (), drain_timeout_s, because)
        try:
            await self._resize(self._roster.size - len(leaving), leaving, drain_timeout_s, because)
        except BaseException:
            if joining:
                await self._resize(self._roster.size - len(joining), joining, 0.0, "they are not needed any more")
            raise
        # The node is empty: whatever comes of this, it is drained.
        with suppress(asyncio.CancelledError):
            await self._make_up(len(leaving) - len(joining), because)

    async def _make_up(self, count: int, because: str) -> None:
        """Have so many more, as far as there is room by now."""
        num_fit, complaint = 0, None
        try:
            num_fit, complaint = await self._fit_elsewhere(count) if count else (0, None)
            if num_fit:
                await self._resize(self._roster.size + num_fit, (), 0.0, because)
        except PhalanxError as error:
            num_fit, complaint = 0, str(error)
        if num_fit < count:
            log.warning("%s: %d replicas have no place elsewhere: %s", because, count - num_fit, complaint)

    async def _resize(self, size: int, leaving: Sequence[int], drain_timeout_s: float, because: str) -> None:
        await (await self._resizing.begin(size, leaving, drain_timeout_s=drain_timeout_s, because=because))

    async def _check_others(self, node: str) -> None:
        """Raises ConfigError if nobody would be left to serve."""
        leaving = self._on(node)
        if len(leaving) < len(set(self._roster.serving()) | set(leaving)):
            return
        num_fit, complaint = await self._fit_elsewhere(len(leaving))
        if leaving and not num_fit:
            allowed = f"all replicas have ranks there, and no other node has room for one: {complaint}"
            raise ConfigError("node", node, allowed)

    def _check_known(self) -> None:
        """Where ranks are is told a moment after an engine has begun. Raises ResizeRefusedError."""
        for number, engine in self._members.active().items():
            if engine.dead is None and engine.down is None and engine.stats is None:
                raise ResizeRefusedError(f"replica {number} has just begun and has not told yet where it is")

    async def _fit_elsewhere(self, count: int) -> tuple[int, str | None]:
        return await self._room.fit(self._roster.size + count, self._roster.free_numbers(count))

    def _on(self, node: str) -> list[int]:
        """The replicas with a rank there."""
        engines = self._members.engines
        return [number for number in self._roster.members() if number in engines and node in engines[number].nodes]

    def _is_left(self, node: str) -> bool:
        """Whether no rank is there, nor comes any more. A replica whose ranks are being started or replaced may have
        got its places before it was told to avoid the node: what comes of that is awaited, for as long as it may take.
        """
        engines, starting = self._members.engines, self._joining.starting
        return all(
            phase != "ending" and number not in starting and number in engines and engines[number].has_left(node)
            for number, phase in self._roster.phases.items()
        )

    def _avoid(self, nodes: tuple[str, ...]) -> None:
        self._joining.avoid(nodes)
        for engine in self._members.engines.values():
            engine.avoid(nodes)


def _others(names: Sequence[str], node: Node) -> tuple[str, ...]:
    """Those of these names that do not mean the node."""
    return tuple(name for name in names if not node.is_called(name))
