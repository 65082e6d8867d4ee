"""A change of an engine's size as its client has asked for it: what the engine's process has answered so far."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from phalanx.errors import ResizeRefusedError
from phalanx.membership.resize import Size
from phalanx.protocol import ResizeEnded, StartProgress


class AskedResize:
    """For one event loop."""

    def __init__(self, number: int, before: Size, asked: Size) -> None:
        self.number = number
        self.before = before
        self.asked = asked
        self.progress: StartProgress | None = None
        """What a rank that is being started has said last."""
        self._begun = asyncio.Event()
        self._over = asyncio.Event()
        self._ended: ResizeEnded | None = None

    def begin(self) -> None:
        """The engine has room for it."""
        self._begun.set()

    def end(self, ended: ResizeEnded) -> None:
        """The first call counts."""
        if self._ended is None:
            self._ended = ended
            self._begun.set()
            self._over.set()

    async def until_begun(self) -> None:
        """Raises ConfigError or ResizeRefusedError if it cannot be."""
        await self._begun.wait()
        if self._ended is None or self._ended.ending != "refused":
            return
        raise self._ended.setting.error() if self._ended.setting else ResizeRefusedError(self._ended.reason)

    async def until_over(self) -> ResizeEnded:
        await self._over.wait()
        assert self._ended is not None
        return self._ended

    async def until_undone(self) -> ResizeEnded:
        """As `until_over`, also if this is cancelled: the engine takes a moment at most."""
        while not self._over.is_set():
            with suppress(asyncio.CancelledError):
                await self._over.wait()
        return await self.until_over()
