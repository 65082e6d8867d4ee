"""Where a replica of a fleet finds its weights instead of in the checkpoint: with one that serves on the same host."""

from __future__ import annotations

import asyncio
from functools import partial

from phalanx.engine.asked_weights import NONE
from phalanx.engine.client import EngineClient
from phalanx.engine.members import Members


class WeightsSource:
    """Asks the engines of a fleet. Which weights these are is compared where they are taken."""

    def __init__(self, members: Members) -> None:
        self._members = members
        for number, engine in members.engines.items():
            self.attach(number, engine)

    def attach(self, number: int, engine: EngineClient) -> None:
        """Have this one's next engine, if it is started again, find the weights that it has by then."""
        engine.find_weights = partial(self._find_for, number, engine)

    async def find(self, number: int | None, version: int, checkpoint: str) -> bytes:
        """For this replica's engine, as in protocol.Begin: those of any other one with this version of this checkpoint.

        NONE if nobody shares them. Waits for ANSWER_S at most.
        """
        asked = [
            engine.share_weights()
            for other, engine in self._members.active().items()
            if other != number and engine.weights_version == version and engine.checkpoint == checkpoint
        ]
        return next(filter(None, await asyncio.gather(*asked)), NONE)

    async def _find_for(self, number: int, engine: EngineClient) -> bytes:
        return await self.find(number, engine.weights_version, engine.checkpoint)
