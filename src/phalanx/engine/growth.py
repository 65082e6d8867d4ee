"""Lets a fleet grow back to the size that is wanted, when there is room again for replicas that were lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from phalanx.engine.awaiting import end_of
from phalanx.engine.fleet_resizing import FleetResizing
from phalanx.engine.members import Members
from phalanx.errors import PhalanxError, UserError

LOOK_S = 1.0
"""How often room is looked for while replicas are missing."""
AGAIN_AFTER_S = 30.0
"""Where there seemed to be room and none could start, it is tried again after so long, and twice as long each time."""
AGAIN_AFTER_AT_MOST_S = 600.0

log = logging.getLogger("phalanx.engine")


class Growth:
    """One replica at a time."""

    def __init__(self, members: Members, resizing: FleetResizing, is_idle: Callable[[], bool]) -> None:
        """`is_idle`: whether nothing else is under way that a resize would be in the way of."""
        self.num_grown = 0
        """Replicas that have come back."""
        self._roster = members.roster
        self._resizing = resizing
        self._is_idle = is_idle
        self._attempt: asyncio.Task[None] | None = None
        self._delay_s = AGAIN_AFTER_S
        self._due_at = 0.0

    async def give_way(self) -> None:
        """Undo what is just beginning: an operator wants another size."""
        if self._attempt is not None and not self._attempt.done():
            self._attempt.cancel()
            await end_of(self._attempt)
            await self._resizing.until_none()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._roster.num_missing:
                self._delay_s, self._due_at = AGAIN_AFTER_S, 0.0
            elif self._is_idle() and time.monotonic() >= self._due_at:
                await self._attempt_once()

    async def _attempt_once(self) -> None:
        """Or none, if it has to give way."""
        self._attempt = asyncio.create_task(self._try())
        try:
            await asyncio.wait((self._attempt,))
        except asyncio.CancelledError:
            self._attempt.cancel()
            raise

    async def _try(self) -> None:
        size = self._roster.size + 1
        try:
            growing = await self._resizing.begin(size, drain_timeout_s=0.0, because="there is room again")
            await growing
        except UserError:  # there is no room yet, or something else has begun just now
            return
        except Exception as error:  # whatever it is, the others go on, and it is tried again
            self._due_at = time.monotonic() + self._delay_s
            has_traceback = not isinstance(error, PhalanxError | OSError)
            told = "a lost replica could not come back, next try in %.0f s: %s"
            log.warning(told, self._delay_s, error, exc_info=has_traceback)
            self._delay_s = min(2 * self._delay_s, AGAIN_AFTER_AT_MOST_S)
            return
        self._delay_s = AGAIN_AFTER_S
        self.num_grown += 1
        log.info("a lost replica is back: %d of %d serve", self._roster.size, self._roster.wanted)
