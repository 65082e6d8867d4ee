"""Requests of a fleet: which replica each is given to, and how it goes on in another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from phalanx.engine.members import Members
from phalanx.engine.router import Router
from phalanx.engine.stream import OutputDelta, RequestStream
from phalanx.errors import EngineDeadError

MAX_DEATHS = 3
"""A request that so many replicas have died with may be why they did, and is given to no other."""


class RoutedRequest:
    """A request, and where it is."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.replica = -1
        """The one that has it; none yet."""
        self.num_deaths = 0
        """Of replicas that had it."""
        self._news = asyncio.Event()

    def note_token(self) -> None:
        """Its client gets some, or its end."""
        self._news.set()

    async def until_token(self, timeout_s: float) -> None:
        """Wait for its next one, for so long at most."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()


class Traffic:
    """Gives each request to the replica that suits it best, and to another one when that lets go of it or dies."""

    def __init__(self, members: Members, block_size: int) -> None:
        self.requests: set[RoutedRequest] = set()
        """Those that run."""
        self._members = members
        self._router = Router(block_size)
        self._is_closing = False

    def close(self) -> None:
        """From now on no request moves because a replica has died."""
        self._is_closing = True

    def forget(self, number: int) -> None:
        """What a replica had in its cache is lost."""
        self._router.forget(number)

    def of_replica(self, number: int) -> list[RoutedRequest]:
        return [request for request in self.requests if request.replica == number]

    async def deltas(self, stream: RequestStream) -> AsyncGenerator[OutputDelta, None]:
        """As EngineClient.generate, by the replica that suits the request best when iteration begins."""
        self._members.living()
        request = RoutedRequest(stream)
        self.requests.add(request)
        try:
            while True:
                # Nothing comes between this and the request's beginning there: then it counts as one of that replica.
                request.replica = self._pick(request.stream)
                async with aclosing(self._follow(request)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            return
        finally:
            self.requests.remove(request)
            request.note_token()

    def move_from(self, number: int) -> None:
        """Let others have the requests of one that is being started again, as long as there are any that serve.

        But each only once: one that has seen two engines end may be why they did. Then it stays where it is, where that
        is found out (engine/trials.py).
        """
        engines = self._members.engines
        others = [other for other in self._members.roster.serving() if other != number]
        if not any(engines[other].condition.is_healthy for other in others):
            return
        for request in self.of_replica(number):
            if not request.num_deaths:
                request.num_deaths += 1
                engines[number].release(request.stream)

    async def _follow(self, request: RoutedRequest) -> AsyncGenerator[OutputDelta, None]:
        """What the replica makes of it, until the request has ended, or moves on."""
        try:
            async with aclosing(self._members.engines[request.replica].follow(request.stream)) as deltas:
                async for delta in deltas:
                    request.note_token()
                    yield delta
        except EngineDeadError:
            request.num_deaths += 1
            if request.num_deaths == MAX_DEATHS or self._is_closing:
                raise

    def _pick(self, stream: RequestStream) -> int:
        """The replica that suits a request best. Raises EngineDeadError if none is left."""
        living, engines = self._members.living(), self._members.engines
        serving = [number for number in self._members.roster.serving() if number in living]
        serving = [number for number in serving if not engines[number].asleep] or serving
        candidates = (
            [number for number in serving if engines[number].condition.is_healthy]
            or serving  # one in trouble may come out of it
            or living  # one that leaves, if it comes to that
        )
        return self._router.pick(stream.token_ids, {number: engines[number].num_running for number in candidates})
