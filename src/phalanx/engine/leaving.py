"""A replica that leaves a fleet is emptied: its requests end there, or move to others that have computed them ahead."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.client import EngineClient
from phalanx.engine.stream import RequestStream
from phalanx.engine.tokenizer import Tokenizer
from phalanx.engine.traffic import RoutedRequest, Traffic
from phalanx.errors import EngineDeadError, RequestError
from phalanx.protocol import SamplingParams

EMPTY_POLL_S = 0.02
PIECE_S = 0.2
PIECE_TOKENS = (16, 2048)
"""A request that moves is computed ahead in pieces of so many tokens, as large as take PIECE_S: what runs beside it
waits as long for its next token.
"""
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
        self._piece = PIECE_TOKENS[0]
        """Tokens that are computed ahead at a time."""

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
        engine.release(request.stream)

    async def _compute_ahead(self, request: RoutedRequest, engine: EngineClient) -> None:
        num_done, is_whole = 0, False
        while not is_whole:
            token_ids = request.stream.token_ids
            if engine.dead is not None or engine.down is not None or request not in self._traffic.requests:
                return  # it waits already, or does so no more
            began_at, before = time.monotonic(), num_done
            num_done = min(before + self._piece, token_ids.size)
            is_whole = num_done == token_ids.size  # but for what is made meanwhile
            async with aclosing(self._traffic.deltas(self._rehearsal(token_ids[:num_done]))) as ahead:
                async for _ in ahead:
                    pass
            took_s = time.monotonic() - began_at
            if not is_whole or took_s > PIECE_S:  # a rest tells only that a piece is too large
                self._piece = piece_that_takes(PIECE_S, num_done - before, took_s)

    def _rehearsal(self, token_ids: NDArray[np.int32]) -> RequestStream:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        return RequestStream(self._tokenizer, token_ids.tolist(), sampling, is_rehearsal=True)


def piece_that_takes(wanted_s: float, piece: int, took_s: float) -> int:
    """Tokens to compute at a time, when `piece` of them took `took_s`: at most twice as many, within PIECE_TOKENS."""
    least, most = PIECE_TOKENS
    return min(max(int(piece * min(wanted_s / max(took_s, 1e-6), 2.0)), least), most)
