"""A change of an engine's size as its client has asked for it: what the engine's process has answered so far."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress

import msgspec

from phalanx.engine.engine import ReplicaState
from phalanx.engine.incarnation import ResizeNews
from phalanx.errors import ResizeError, ResizeRefusedError, ResizeUnderWayError
from phalanx.membership.resize import Size
from phalanx.protocol.client import CancelResize, EngineReady, Resize, ResizeBegun, ResizeEnded, StartProgress


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


class AskedResizes:
    """Of one engine, one at a time. For one event loop."""

    def __init__(
        self, send: Callable[[Resize | CancelResize], None], on_resized: Callable[[EngineReady, Size], None]
    ) -> None:
        """`send` gives the engine a message; `on_resized` is told of each that is done, before who waits for it."""
        self._send = send
        self._on_resized = on_resized
        self._numbers = itertools.count()
        self._resize: AskedResize | None = None

    @property
    def is_under_way(self) -> bool:
        return self._resize is not None

    def check_none(self) -> None:
        """Raises ResizeUnderWayError."""
        if self._resize is not None:
            raise ResizeUnderWayError(str(self._resize.before), str(self._resize.asked))

    async def begin(self, now: Size, asked: Size, *, moves: bool = False) -> asyncio.Task[None]:
        """As Engine.begin_resize, for an engine that serves. With `moves` ranks are replaced also if they are to be as
        many as now: they come to where ranks may be by then."""
        resize = AskedResize(next(self._numbers), now, asked)
        if asked == now and not moves:
            resize.end(ResizeEnded(resize.number, "done"))
        else:
            self._resize = resize
            self._send(Resize(resize.number, *asked))
        try:
            await resize.until_begun()
            seeing_through = asyncio.create_task(self._see_through(resize))
            await asyncio.sleep(0)  # a task that is cancelled before it has begun does nothing at all
        except asyncio.CancelledError:
            self._undo(resize)
            raise
        return seeing_through

    def joining(self) -> list[ReplicaState]:
        """Replicas that there will be more of: those in lockstep join together."""
        if self._resize is None:
            return []
        joining = ReplicaState(replica=0, state="joining", num_requests=0)
        if (told := self._resize.progress) is not None:
            joining = msgspec.structs.replace(joining, phase=told.phase, done=told.done, total=told.total)
        new = range(self._resize.before.data_parallel_size, self._resize.asked.data_parallel_size)
        return [msgspec.structs.replace(joining, replica=replica) for replica in new]

    def note(self, news: ResizeNews) -> None:
        """What the engine tells."""
        resize = self._resize
        if resize is None:
            return
        if isinstance(news, StartProgress):
            resize.progress = news
        elif isinstance(news, ResizeBegun):
            resize.begin()
        else:
            self._resize = None
            if news.ready is not None:
                self._on_resized(news.ready, resize.asked)
            resize.end(news)

    def give_up(self, reason: str) -> None:
        """The engine has ended: one that is started again has the size from before."""
        if self._resize is not None:
            self.note(ResizeEnded(self._resize.number, "failed", reason))

    async def _see_through(self, resize: AskedResize) -> None:
        """Wait for the end of a resize, and undo it if this is cancelled. Raises ResizeError if it was undone."""
        try:
            ended = await resize.until_over()
        except asyncio.CancelledError:
            self._undo(resize)
            ended = await resize.until_undone()
            if ended.ending == "cancelled":
                raise
        if ended.ending != "done":
            change = f"from {resize.before} to {resize.asked}" if resize.asked != resize.before else "to other nodes"
            raise ResizeError(f"{change}: {ended.reason or 'it was cancelled'}")

    def _undo(self, resize: AskedResize) -> None:
        """Unless it is over: the engine tells what has become of it."""
        if self._resize is resize:
            self._send(CancelResize(resize.number))
