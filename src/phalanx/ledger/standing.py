"""Which verdict stands: from when on it is to be believed, and until when. Pure."""

from __future__ import annotations

from phalanx.ledger.verdict import Verdict

BELIEVED_AFTER_S = 0.2
FORGOTTEN_AFTER_S = 0.5
"""A look that finds nothing may have come at an unlucky moment."""

LONGEST_LOOK_S = 0.5
"""From one look to the next. After a longer pause a verdict has to be found for a while anew."""


class Standing:
    """What is found at each look, taken together."""

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        """The one that stands, as it was first found; None as long as all is well."""
        self.since_ns = 0
        """From when on the culprit was awaited, or what it did was seen."""
        self._found: Verdict | None = None
        self._found_ns = self._looked_ns = 0
        self._absent_ns: int | None = None

    def take(self, found: Verdict | None, now_ns: int) -> bool:
        """What was found at a look, None if nothing. Returns whether another verdict stands now, or none any more."""
        was_away = now_ns - self._looked_ns > LONGEST_LOOK_S * 1e9
        self._looked_ns = now_ns
        if found is None:
            return self._miss(now_ns)
        self._absent_ns = None
        if was_away or not _is_same(found, self._found):
            self._found, self._found_ns = found, now_ns
        is_young = not found.is_final and now_ns - self._found_ns < BELIEVED_AFTER_S * 1e9
        if is_young or _is_same(found, self.verdict):
            return False
        self.verdict, self.since_ns = found, now_ns - int(found.waited_s * 1e9)
        return True

    def _miss(self, now_ns: int) -> bool:
        self._found = None
        if self.verdict is None:
            return False
        if self._absent_ns is None:
            self._absent_ns = now_ns
        if now_ns - self._absent_ns < FORGOTTEN_AFTER_S * 1e9:
            return False
        self.verdict = self._absent_ns = None
        return True


def _is_same(one: Verdict, other: Verdict | None) -> bool:
    return other is not None and (one.cause, one.culprits) == (other.cause, other.culprits)
