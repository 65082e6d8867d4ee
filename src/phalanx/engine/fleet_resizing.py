"""The size of a fleet: one change at a time, of which the roster knows what commits it and what undoes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from phalanx.engine.awaiting import begun
from phalanx.engine.members import Members
from phalanx.engine.room import Room
from phalanx.engine.roster import FleetResize
from phalanx.engine.roster_work import RosterWork
from phalanx.errors import EngineDeadError, ResizeError

log = logging.getLogger("phalanx.engine")


class FleetResizing:
    """For operators, and for who takes a fleet off a node or lets it grow again."""

    def __init__(self, members: Members, work: RosterWork, room: Room, check: Callable[[], None]) -> None:
        """`check` raises if no resize may begin now, for reasons that the roster does not know of."""
        self._members = members
        self._roster = members.roster
        self._work = work
        self._room = room
        self._check = check
        self._changed = asyncio.Event()
        self._is_closing = False

    async def begin(
        self, size: int, leaving: Sequence[int] = (), *, drain_timeout_s: float, because: str | None = None
    ) -> asyncio.Task[None]:
        """As Engine.begin_resize. `because` is as for Roster.begin."""
        joining = self._roster.free_numbers(max(size - self._roster.size, 0))
        await self._room.check(size, joining, self._members.pids())
        self._check()
        num_requests, down = self._members.num_requests(), self._members.numbers_down()
        orders = self._roster.begin(size, leaving, num_requests, down, because=because)
        self._work.drain_timeout_s = drain_timeout_s
        resize = self._roster.resize
        if resize is not None:
            why = "" if because is None else f": {because}"
            log.info("resizing from %d to %d replicas%s", resize.size_before, resize.size_asked_for, why)
        self._work.carry_out(orders)
        return await begun(self._see_through(resize))

    async def until_none(self) -> None:
        """Wait for the end of the one that is under way, if one is. Raises EngineDeadError when the fleet is closed."""
        if (resize := self._roster.resize) is not None:
            await self._until_over(resize)

    def note_change(self) -> None:
        """Something about the replicas has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Nobody sees to the end of a resize any more."""
        self._is_closing = True
        self.note_change()

    async def _see_through(self, resize: FleetResize | None) -> None:
        """Wait for the end of a resize, and undo it if this is cancelled. Raises ResizeError if it was undone."""
        if resize is None:  # there are as many as asked for
            return
        try:
            await self._until_over(resize)
        except asyncio.CancelledError:
            self._work.carry_out(self._roster.cancel("it was cancelled"))
            await self._until_over(resize)
            if resize.outcome is not None and resize.outcome.ending == "cancelled":
                raise
        assert resize.outcome is not None
        if resize.outcome.ending != "done":
            raise ResizeError(str(resize.outcome.reason))

    async def _until_over(self, resize: FleetResize) -> None:
        while self._roster.resize is resize:
            if self._is_closing:
                raise EngineDeadError("the engine is shutting down")
            await self._changed.wait()
