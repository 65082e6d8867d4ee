"""How long a rank may take for what it says that it does: one table."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

BUDGETS_S: Mapping[str, float] = {
    "starting": 300.0,
    "joining": 120.0,
    "loading": 300.0,
    "sizing": 300.0,
    "allocating": 120.0,
    "compiling": 1800.0,
    "capturing": 900.0,
    "rebuilding": 300.0,
    "moving experts": 120.0,
    "switching weights": 300.0,
    "falling asleep": 120.0,
    "waking": 300.0,
    "leaving": 60.0,
    "another phase": 300.0,
}
"""Without a sign of progress. `idle` and `asleep` may last for ever, `stepping` is judged by its step, and `calling a
method` has the deadline of its caller."""

_OF_START = 0.8
_OF_STEP = 0.5


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The deadlines of the run, before which a verdict is worth most."""

    step_timeout_s: float = 60.0
    start_timeout_s: float = 600.0

    def budget_s(self, phase: str) -> float | None:
        """How long a phase may last, None if for ever: what the table says, and less than what would end the run."""
        if phase == "stepping":
            return self.step_s
        budget_s = BUDGETS_S.get(phase)
        return None if budget_s is None else min(budget_s, _OF_START * self.start_timeout_s)

    @property
    def step_s(self) -> float:
        """How long a step may take at most, whatever steps usually take."""
        return _OF_STEP * self.step_timeout_s
