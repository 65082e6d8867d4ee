"""Other weights, sleep and wake as a client has asked its engine for them, and what has become of that."""

from __future__ import annotations

import asyncio

from phalanx.errors import MaintenanceError, NotNowError, PhalanxError, UserError
from phalanx.protocol.client import Maintained


class AskedMaintenance:
    """One order at a time. For one event loop."""

    def __init__(self, weights_version: int) -> None:
        self.weights_version = weights_version
        """Of what the next tokens are made with."""
        self.sleep_level = 0
        self._next_version = weights_version
        """Of the weights that the engine may be getting."""
        self._asked: asyncio.Future[None] | None = None

    @property
    def is_under_way(self) -> bool:
        return self._asked is not None

    def begin(self, weights_version: int | None) -> asyncio.Future[None]:
        """An order is sent now; new weights get this version, by default the next one. Its outcome comes from this."""
        assert self._asked is None
        self._next_version = weights_version or self.weights_version + 1
        self._asked = asyncio.get_running_loop().create_future()
        return self._asked

    def note(self, outcome: Maintained, sleep_level: int) -> None:
        """What the engine tells at the end of one, and the level that it sleeps at now."""
        if outcome.has_new_weights:
            self.weights_version = self._next_version
        self.sleep_level = sleep_level

    def end(self, error: PhalanxError | None) -> None:
        """Tell who waits for it, if somebody does: an engine that was started again is put to sleep by itself."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        if error is None:
            asked.set_result(None)
        else:
            asked.set_exception(error)
            asked.exception()  # who asked for it may have gone


def error_of(outcome: Maintained) -> PhalanxError | None:
    """What was wrong, as who has asked is told it."""
    if outcome.error is None:
        return None
    if outcome.is_not_now:
        return NotNowError(outcome.error)
    return UserError(outcome.error) if outcome.is_user_error else MaintenanceError(outcome.error)
