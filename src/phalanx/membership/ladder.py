"""What is tried after a fault, in which order, and for how long. Pure: no process, and times are given.

The rungs, from the least costly on: the line that stands ready; a new line, on the memory that the last one left; a new
line that has nothing but the checkpoint, so that requests are computed again from their tokens. Each has a deadline,
and a fault on one of them starts the next try. The last rung left, it is over.

A line that fails before it has shown any progress was of no use. After several of those in a row what they all had from
the first of them is not trusted any more: its memory; and in the end it is given up, since the fault is in what comes
back each time.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

Rung = Literal["standby", "new line", "checkpoint"]

MOST_TRIES: dict[Rung, int] = {"standby": 1, "new line": 2, "checkpoint": 3}
"""In one recovery. What is started may be hit by a fault of its own."""

STANDBY_S = 2.0
"""For the answer of a line that says it is ready."""

NEW_LINE_SHARE = 0.5
"""Of the time that is left: as much remains for what comes after it."""

MOST_FRUITLESS_ON_MEMORY = 6
"""Recoveries in a row without progress. A request that kills is found, alone, in fewer."""

MOST_FRUITLESS = 12


class Attempt(NamedTuple):
    rung: Rung
    deadline_s: float


class Ladder:
    """Of one formation, over all its recoveries."""

    def __init__(self, budget_s: float) -> None:
        """`budget_s`: how long one recovery may take, all in all."""
        self._budget_s = budget_s
        self._num_fruitless = 0

    def progressed(self) -> None:
        """The line does what it is there for."""
        self._num_fruitless = 0

    def begin(self, now_s: float) -> Climb:
        """A line has failed."""
        self._num_fruitless += 1
        return Climb(now_s, self._budget_s, self._num_fruitless)


class Climb:
    """One recovery."""

    def __init__(self, began_s: float, budget_s: float, num_fruitless: int) -> None:
        self._began_s = began_s
        self._budget_s = budget_s
        self._num_fruitless = num_fruitless
        self._tries: Counter[Rung] = Counter()
        self._tried: list[str] = []

    def next(self, now_s: float, *, has_standby: bool, holds_memory: bool, may_reload: bool) -> Attempt | None:
        """What to try now; None if it is over.

        `has_standby`: a line stands ready. `holds_memory`: what the last line left is there. `may_reload`: the weights
        in use are those of the checkpoint.
        """
        left_s = self._began_s + self._budget_s - now_s
        if left_s <= 0:
            self._tried.append(f"{self._budget_s:.3g} s (heal_timeout_s) are over")
            return None
        if self._num_fruitless > MOST_FRUITLESS:
            self._tried.append(
                f"{MOST_FRUITLESS} times in a row new ranks have failed before they had computed anything"
            )
            return None
        trusts_memory = holds_memory and self._num_fruitless <= MOST_FRUITLESS_ON_MEMORY
        if has_standby and trusts_memory and self._may_try("standby"):
            return self._attempt("standby", min(STANDBY_S, left_s))
        if trusts_memory and self._may_try("new line"):
            return self._attempt("new line", NEW_LINE_SHARE * left_s)
        if not may_reload:
            self._tried.append("weights that a method has changed are lost, and the checkpoint does not have them")
            return None
        return self._attempt("checkpoint", left_s) if self._may_try("checkpoint") else None

    def failed(self, rung: Rung, why: str) -> None:
        """A try has brought no line."""
        self._tried.append(f"{rung}: {why}")

    @property
    def tried(self) -> str:
        """What was tried, and why it is over."""
        return "; ".join(self._tried)

    def _may_try(self, rung: Rung) -> bool:
        return self._tries[rung] < MOST_TRIES[rung]

    def _attempt(self, rung: Rung, deadline_s: float) -> Attempt:
        self._tries[rung] += 1
        return Attempt(rung, deadline_s)
