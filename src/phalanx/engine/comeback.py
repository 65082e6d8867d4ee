"""An engine that has ended before its time is started again, as often as it may be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from phalanx.engine.incarnation import NAME, Incarnation, OnProgress
from phalanx.engine.restarts import WINDOW_S, Restarts
from phalanx.errors import PhalanxError, PlacementError
from phalanx.protocol.client import StartProgress

LACKS_ROOM_AFTER = 2
"""Starts in a row that find no room before that is told: Ray takes a moment to give back what the last engine had, and
a node may be just about to come back."""

log = logging.getLogger("phalanx.engine")


class Comeback:
    """Of one client's engine, again and again. Tells whose it is when there is one again, or will be none."""

    def __init__(
        self,
        most: int,
        start_again: Callable[[OnProgress], Awaitable[Incarnation]],
        *,
        succeed: Callable[[Incarnation], None],
        give_up: Callable[[str], None],
        num_waiting: Callable[[], int],
    ) -> None:
        """`most` of them within WINDOW_S. `num_waiting` are the requests that go on with the next engine."""
        self.down: str | None = None
        """Why the engine is being started again; None when it is not."""
        self.lacks_room: str | None = None
        """What is missing on the nodes of a cluster, if that is why the last ones could not start."""
        self.phase: str | None = None
        """What the one that starts does."""
        self._restarts = Restarts(most)
        self._start_again = start_again
        self._succeed = succeed
        self._give_up = give_up
        self._num_waiting = num_waiting
        self._num_without_room = 0
        """Starts in a row."""
        self._task: asyncio.Task[None] | None = None

    def begin(self, ended: Incarnation, reason: str) -> None:
        """Start another one after this, or give up at once if there were too many."""
        delay_s = self._restarts.next_delay_s(time.monotonic())
        if delay_s is None:
            self._give_up(reason + self._told_restarts())
            return
        self.down = reason
        self._task = asyncio.create_task(self._restart(ended, delay_s))

    def note_over(self) -> None:
        """There is an engine again, or none any more."""
        self.down = self.phase = None

    async def cancel(self) -> None:
        """Start none, and end the one that starts."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _restart(self, ended: Incarnation, delay_s: float) -> None:
        """Until there is an engine again, or no more restarts are left."""
        began_at = time.monotonic()
        try:
            incarnation = await self._next(ended, delay_s)
        except Exception as error:
            self._give_up(f"{NAME} cannot be started again: {error!r}")
            raise
        if incarnation is None:
            self._give_up(f"{self.down}{self._told_restarts()}")
            return
        taken_s = time.monotonic() - began_at
        log.warning("%s serves again after %.1f s, requests that go on: %d", NAME, taken_s, self._num_waiting())
        self._note_room(None)
        self._succeed(incarnation)

    async def _next(self, ended: Incarnation, delay_s: float | None) -> Incarnation | None:
        while delay_s is not None:
            log.error(
                "%s; it is started again (%d of %d within %g s), requests that wait for it: %d",
                self.down,
                self._restarts.num_recent,
                self._restarts.most,
                WINDOW_S,
                self._num_waiting(),
            )
            await ended.end()
            await ended.until_ranks_are_gone()
            await asyncio.sleep(delay_s)
            try:
                return await self._start_again(self._note_phase)
            except (PhalanxError, OSError) as error:
                self.down = str(error)
                self._note_room(error.complaint if isinstance(error, PlacementError) else None)
                delay_s = self._restarts.next_delay_s(time.monotonic())
        return None

    def _note_room(self, complaint: str | None) -> None:
        """How the last start has ended, as far as that goes."""
        self._num_without_room = 0 if complaint is None else self._num_without_room + 1
        self.lacks_room = complaint if self._num_without_room >= LACKS_ROOM_AFTER else None

    def _note_phase(self, progress: StartProgress) -> None:
        self.phase = progress.phase

    def _told_restarts(self) -> str:
        num = self._restarts.num_recent
        return f" (it was started again {num} times within {WINDOW_S:.0f} s)" if num else ""
