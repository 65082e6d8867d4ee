"""A time that several waits share."""

from __future__ import annotations

import time


class Deadline:
    """Runs from the moment it is made: what one wait takes is not there for the next."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._began_at = time.monotonic()

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began_at

    @property
    def remaining_s(self) -> float:
        """0 when it is over."""
        return max(self.timeout_s - self.waited_s, 0.0)
