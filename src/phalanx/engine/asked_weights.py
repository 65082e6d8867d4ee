"""An engine's weights as its client has asked it for them, for another one to compute with."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from phalanx.config import Config
from phalanx.protocol.client import ShareWeights, WeightsShared

ANSWER_S = 5.0
"""Whoever starts with a copy of its own waits no longer for it: an engine on a CPU answers between two steps."""

NONE = b""

log = logging.getLogger("phalanx.engine")


def may_share_weights(config: Config, device: str) -> bool:
    """Whether engines of this configuration, on such a device, may have them in common, as far as a client knows."""
    is_here = device == "cpu" and config.executor.launcher != "ray"
    return is_here and config.model.share_weights != "never" and config.healing.heal


class AskedWeights:
    """For one event loop."""

    def __init__(self, send: Callable[[ShareWeights], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[bytes]] = {}

    async def ask(self) -> bytes:
        """As in protocol.Begin: NONE where there are none, also if there is no answer after ANSWER_S."""
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._send(ShareWeights(number))
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            log.warning("an engine has not said in %g s which weights others may share: they read their own", ANSWER_S)
            return NONE
        finally:
            del self._asked[number]

    def note(self, answer: WeightsShared) -> None:
        """It may come when nobody waits for it any more."""
        if (asked := self._asked.get(answer.number)) is not None and not asked.done():
            asked.set_result(answer.weights)

    def give_up(self) -> None:
        """The engine has ended."""
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(NONE)
