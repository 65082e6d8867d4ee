"""Carries out what the roster of a fleet orders: a task for each replica, which tells the roster how it went."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from phalanx.engine.awaiting import end_of
from phalanx.engine.engine import DRAIN_TIMEOUT_S
from phalanx.engine.joining import Joining
from phalanx.engine.leaving import Leaving
from phalanx.engine.members import Members
from phalanx.engine.room import Room
from phalanx.engine.roster import Empty, End, Keep, Order, Replace, Start
from phalanx.engine.traffic import Traffic
from phalanx.errors import PhalanxError

REPLACE_AFTER_S = 30.0
"""An engine that could not be started again waits so long for another one, and twice as long each time it fails."""
REPLACE_AFTER_AT_MOST_S = 600.0

log = logging.getLogger("phalanx.engine")


class RosterWork:
    """Decides nothing."""

    def __init__(
        self,
        members: Members,
        joining: Joining,
        leaving: Leaving,
        traffic: Traffic,
        room: Room,
        note_change: Callable[[], None],
    ) -> None:
        """`note_change` is called whenever the roster may have changed."""
        self.drain_timeout_s = DRAIN_TIMEOUT_S
        """So long may requests end in replicas that leave from now on."""
        self._members = members
        self._roster = members.roster
        self._joining = joining
        self._leaving = leaving
        self._traffic = traffic
        self._room = room
        self._note_change = note_change
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By the numbers of replicas: one thing at a time."""
        self._is_closing = False

    def carry_out(self, orders: Sequence[Order]) -> None:
        for order in () if self._is_closing else orders:  # all end, and nobody would wait for these
            number = order.number
            before = self._tasks.pop(number, None)
            if before is asyncio.current_task():
                before = None
            if before is not None:
                before.cancel()
            self._tasks[number] = asyncio.create_task(self._do(order, before))
        self._note_change()

    async def close(self) -> None:
        """Give up what is being done. What the roster orders from now on is left undone."""
        self._is_closing = True
        self._note_change()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _do(self, order: Order, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await end_of(before)
        number = order.number
        if isinstance(order, Start):
            await self._start(number)
        elif isinstance(order, Empty):
            await self._leaving.empty(number, self._members.engines[number], self.drain_timeout_s)
            self.carry_out(self._roster.emptied(number))
        elif isinstance(order, Replace):
            await self._replace(number)
        elif isinstance(order, End):
            await self._end(number)
        else:
            assert isinstance(order, Keep), order

    async def _start(self, number: int) -> None:
        try:
            await self._launch(number)
        except Exception as error:  # whatever it is, the others go on, and who waits has to be told
            log.error("replica %d did not start: %s", number, error, exc_info=not isinstance(error, PhalanxError))
            self.carry_out(self._roster.failed(number, str(error) or type(error).__name__))
        else:
            self.carry_out(self._roster.ready(number))

    async def _launch(self, number: int) -> None:
        size = max(self._roster.size, self._roster.resize.size_asked_for if self._roster.resize else 0)
        engine = await self._joining.start(number, size, sleep_level=lambda: self._members.asleep)
        self._members.engines[number] = engine

    def lose(self, number: int, reason: str) -> None:
        """There is no place for a replica any more: others take over its requests at once, and its engine is ended."""
        log.error("replica %d is lost, %d are left: %s", number, self._roster.size - 1, reason)
        self.carry_out(self._roster.lost(number, reason))
        self._members.engines[number].release()

    async def _replace(self, number: int) -> None:
        """Start an engine in the place of one that has ended, until it is there, or the place is gone."""
        await self._close(number)
        delay_s = REPLACE_AFTER_S
        while True:
            await asyncio.sleep(delay_s)
            try:
                complaint = await self._room.complaint_about(number, self._roster.size)
                if complaint is not None and self._roster.serving():
                    self.lose(number, complaint)
                    return
                await self._launch(number)
            except Exception as error:
                delay_s = min(2 * delay_s, REPLACE_AFTER_AT_MOST_S)
                log.error("replica %d could not be replaced, next try in %.0f s: %s", number, delay_s, error)
            else:
                self._traffic.forget(number)
                log.info("replica %d has been replaced", number)
                self.carry_out(self._roster.ready(number))
                return

    async def _end(self, number: int) -> None:
        if number in self._members.engines:
            await self._close(number)
            del self._members.engines[number]
        self._traffic.forget(number)
        self.carry_out(self._roster.ended(number))

    async def _close(self, number: int) -> None:
        """End an engine. What the kernel cannot end is said: nothing can be done about it, and others wait."""
        try:
            await self._members.engines[number].close()
        except Exception:
            log.exception("replica %d did not end", number)
