"""How many tokens of a request that is about to move here are computed in a step beside others: as many as take no
longer than the others do without them, so that no stream waits for more than two of its steps. Pure: times are given.

What a token takes is not the same for few and for many: a few are computed in the time that weights take to be read. So
it is what it took at most of late, and what is aimed at is less than may be.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

BESIDE = 0.75
"""What such tokens may add to a step, of what it takes without them."""
ALONE_S = 0.1
"""For a step in which nobody else computes: so long would one wait who comes in meanwhile."""
GROWTH_BESIDE, GROWTH_ALONE = 1.25, 2.0
"""From one step to the next: few tokens tell little of what many take."""
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


class StepTokens(NamedTuple):
    """What a step computes, by who waits for it."""

    decoding: int
    prompts: int
    ahead: int
    """Of requests that are to move here."""


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
            return AheadLimits(0, self._tokens_in(ALONE_S, GROWTH_ALONE))
        beside_s = BESIDE * statistics.median(self._others_s)
        return AheadLimits(self._tokens_in(beside_s, GROWTH_BESIDE), self._tokens_in(ALONE_S, GROWTH_ALONE))

    def note(self, took_s: float, tokens: StepTokens) -> None:
        """A step with these took so long."""
        if not tokens.ahead:
            self._others_s.append(took_s)
            self._num_since = 0
        elif not tokens.prompts:  # beside these, nobody knows which of the two took how long
            others_s = statistics.median(self._others_s) if tokens.decoding and self._others_s else 0.0
            self._token_s.append(max(took_s - others_s, 0.0) / tokens.ahead)
            self._latest = max(tokens.ahead, LEAST)
            self._num_since += bool(tokens.decoding)

    def _tokens_in(self, wanted_s: float, growth: float) -> int:
        """At most so many times as many as the last time."""
        token_s = max(self._token_s, default=0.0)
        most = min(int(growth * self._latest), MOST)
        return max(int(min(wanted_s / token_s, most)) if token_s else most, LEAST)
