"""How many tokens of a request that is about to move here are computed in a step beside others: as many as take no
longer than the others do without them, so that no stream waits for more than two of its steps. Pure: times are given.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

ALONE_S = 0.1
"""For a step in which nobody else computes: so long would one wait who comes in meanwhile."""
LEAST, MOST = 8, 2048
"""Tokens in a step."""
NUM_SAMPLES = 8
LOOK_AGAIN_AFTER = 32
"""After so many steps with such tokens one without: how long that takes changes with the others."""


class AheadLimits(NamedTuple):
    """Tokens of requests that are to move here, in one step."""

    beside: int
    """Where others make tokens."""
    alone: int


class Pace:
    """Of the steps of one brain."""

    def __init__(self) -> None:
        self._others_s: deque[float] = deque(maxlen=NUM_SAMPLES)
        """Of steps without such tokens."""
        self._token_s: deque[float] = deque(maxlen=NUM_SAMPLES)
        """What a token adds to them, or takes alone."""
        self._latest = LEAST
        self._num_since = 0
        """Steps in which others had such tokens beside them since the last one without."""

    @property
    def limits(self) -> AheadLimits:
        """For the next step."""
        if not self._others_s or self._num_since >= LOOK_AGAIN_AFTER:
            return AheadLimits(0, self._tokens_in(ALONE_S))
        return AheadLimits(self._tokens_in(statistics.median(self._others_s)), self._tokens_in(ALONE_S))

    def note(self, took_s: float, num_ahead: int, num_others: int) -> None:
        """A step took so long in which so many of such tokens were computed, beside others that decode, or none."""
        if not num_ahead:
            self._others_s.append(took_s)
            self._num_since = 0
            return
        others_s = statistics.median(self._others_s) if num_others and self._others_s else 0.0
        self._token_s.append(max(took_s - others_s, 0.0) / num_ahead)
        self._latest = max(num_ahead, LEAST)
        self._num_since += bool(num_others)

    def _tokens_in(self, wanted_s: float) -> int:
        """At most twice as many as the last time: a few tell little of many."""
        token_s = statistics.median(self._token_s) if self._token_s else 0.0
        most = min(2 * self._latest, MOST)
        return max(int(min(wanted_s / token_s, most)) if token_s else most, LEAST)
