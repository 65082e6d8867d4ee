"""A replica that leaves a fleet is emptied: its requests end there, or move to others that have computed them ahead."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.client import EngineClient
from phalanx.engine.stream import RequestStream
from phalanx.engine.tokenizer import Tokenizer
from phalanx.engine.traffic import RoutedRequest, Traffic
from phalanx.errors import EngineDeadError, RequestError
from phalanx.protocol.sampling import SamplingParams

EMPTY_POLL_S = 0.02
FEW_TOKENS = 8
"""So many are computed in the step in which a request goes on elsewhere."""
MOST_PASSES = 4
"""A request may make tokens faster than others compute them."""
NEXT_TOKEN_S = 0.5
"""A request moves when it has just made a token; if it takes longer for that, in between."""
MOVE_TIMEOUT_S = 60.0
"""For all requests of a replica that leaves: the others may be too busy to keep up with what it makes, or hang."""

log = logging.getLogger("phalanx.engine")


class Leaving:
    """Of any replica of a fleet."""

    def __init__(self, traffic: Traffic, tokenizer: Tokenizer, *, is_prefix_caching: bool) -> None:
        """Without prefix caching nothing can be computed ahead."""
        self._traffic = traffic
        self._tokenizer = tokenizer
        self._is_prefix_caching = is_prefix_caching

    async def empty(self, number: int, engine: EngineClient, drain_timeout_s: float) -> None:
        """Let a replica's requests end, and give those that take too long to others."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                while engine.num_running and engine.dead is None and engine.down is None:
                    await asyncio.sleep(EMPTY_POLL_S)
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S):
                for request in self._traffic.of_replica(number):
                    await self._move(request, engine)
        except TimeoutError:
            num_left = engine.num_running
            log.warning("replica %d: %d requests move before others have computed them ahead", number, num_left)
        engine.release()

    async def _move(self, request: RoutedRequest, engine: EngineClient) -> None:
        """Have a request go on in another replica, which computes what there is of it while it still runs in this one.

        So its client waits only for what is new since then, which is not in the other one's prefix cache.
        """
        if self._is_prefix_caching:
            with suppress(EngineDeadError, RequestError):  # then it has to wait for that
                await self._compute_ahead(request, engine)
            if request in self._traffic.requests:
                await request.until_token(NEXT_TOKEN_S)
        engine.release(request.stream)

    async def _compute_ahead(self, request: RoutedRequest, engine: EngineClient) -> None:
        """What there is, then what has come meanwhile, and so on. How much of it is computed in a step is for the other
        engine to say (pace.py).
        """
        for _ in range(MOST_PASSES):
            token_ids = request.stream.token_ids
            if engine.dead is not None or engine.down is not None or request not in self._traffic.requests:
                return  # it waits already, or does so no more
            async with aclosing(self._traffic.deltas(self._rehearsal(token_ids))) as ahead:
                async for _delta in ahead:
                    pass
            if request.stream.token_ids.size - token_ids.size <= FEW_TOKENS:
                return

    def _rehearsal(self, token_ids: NDArray[np.int32]) -> RequestStream:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        return RequestStream(self._tokenizer, token_ids.tolist(), sampling, is_rehearsal=True)
