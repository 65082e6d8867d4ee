"""What has been found must have stood for a while before it is told, unless it cannot change any more."""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.ledger.verdict import Cause, Verdict

LOOK_S = 0.05
"""From one look to the next, as long as nothing ends."""

FULL_LOOK_S = 0.1
"""All records are read this often at most, and only while something is suspicious."""

STANDS_S: Mapping[Cause, float] = {
    "gone": 0,
    "diverged": 0,
    "gil": 0,
    "lost": 0,
    "store": 0,
    "overdue": 0,
    "stopped": 0.5,
    "skipped": 0.01,
    "circle": 0.01,
}
"""How long a verdict must have been the same before it is told: nothing where a duration is what it says, and two looks
where ranks are seen at different moments."""

OTHERS_STAND_S = FULL_LOOK_S
"""So that all records have been read twice."""

OVER_S = 0.2
"""For how long nothing must be wrong before a verdict is over."""

LONGEST_LOOK_S = 0.5
"""From one look to the next. After a longer pause a verdict has to stand anew."""

_NS = 1e9


class Confirmation:
    """Lets a verdict through once, when it has stood for a while: one look may have caught ranks on their way."""

    def __init__(self, told: Verdict | None = None) -> None:
        self.told = told
        """What has been told and still stands."""
        self._pending: object = None
        self._stands_s = OVER_S
        self._since_ns = self._looked_ns = 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has been told, or is about to be."""
        return self.told is None and self._pending is None

    @property
    def next_look_s(self) -> float:
        """When to look again: soon, if only that is missing for a verdict to be told."""
        return min(LOOK_S, self._stands_s) if self._pending != _identity(self.told) else LOOK_S

    def take(self, verdict: Verdict | None, now_ns: int) -> Verdict | None:
        """What was found at a look, None if nothing. Returns it if it is to be told now."""
        was_away = now_ns - self._looked_ns > LONGEST_LOOK_S * _NS  # then all may have been stopped, this process too
        self._looked_ns = now_ns
        identity = _identity(verdict)
        if identity != self._pending or was_away:
            self._pending, self._since_ns = identity, now_ns
            self._stands_s = OVER_S if verdict is None else STANDS_S.get(verdict.cause, OTHERS_STAND_S)
        if identity == _identity(self.told) or now_ns - self._since_ns < self._stands_s * _NS:
            return None
        self.told = verdict
        return verdict


def finding(verdict: Verdict | None) -> object:
    """What it says of whom."""
    return verdict and (verdict.cause, verdict.culprits, verdict.group, verdict.sequence)


def _identity(verdict: Verdict | None) -> object:
    # Who waits for a core comes when it has one, and who does not may never come.
    return verdict and (finding(verdict), verdict.is_of_a_busy_host)
