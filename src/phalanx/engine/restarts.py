"""How often an engine that has ended is started again, and after how long. Pure: the time is given."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 30.0


class Restarts:
    """So many within WINDOW_S. The first comes at once, each further one twice as late as the one before."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._at: deque[float] = deque()

    def next_delay_s(self, now: float) -> float | None:
        """Seconds to wait before the next one, which is then counted; None if there were too many."""
        while self._at and now - self._at[0] > WINDOW_S:
            self._at.popleft()
        if len(self._at) >= self.most:
            return None
        delay_s = min(FIRST_DELAY_S * 2 ** (len(self._at) - 1), LONGEST_DELAY_S) if self._at else 0.0
        self._at.append(now)
        return delay_s

    @property
    def num_recent(self) -> int:
        """Those within the window, as of the last call."""
        return len(self._at)
