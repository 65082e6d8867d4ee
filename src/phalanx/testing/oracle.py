"""Whether a verdict is right: compared with what was injected. Pure.

What a verdict does not say is neither right nor wrong: it counts as unsaid.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from phalanx.ledger.verdict import Verdict
from phalanx.testing.faults import Fault, Injected, Kind

Answer = Literal["right", "wrong", "unsaid", "ambiguous"]

_DIVERGED = frozenset({"diverged", "skipped", "circle"})
CAUSES: dict[Kind, frozenset[str]] = {
    "kill": frozenset({"gone"}),
    "oom": frozenset({"gone"}),
    "stop": frozenset({"stopped"}),
    "wedge": frozenset({"gil", "late", "behind"}),
    "loop": frozenset({"slow", "late", "behind"}),
    "slow": frozenset({"late"}),
    "error": frozenset({"failed"}),
    "skip": _DIVERGED,
    "extra": _DIVERGED,
    "swap": frozenset({"diverged"}),
    "shape": frozenset({"diverged"}),
    "dtype": frozenset({"diverged"}),
    "early-return": _DIVERGED,
    "reorder": _DIVERGED,
    "link": frozenset({"hung"}),
    "store": frozenset({"store"}),
}
"""Causes that say what happened, for each kind. `failed` is no verdict: the rank itself has told its exception."""


class Rightness(msgspec.Struct, frozen=True, kw_only=True):
    """Of each thing that a verdict names."""

    culprit: Answer
    cause: Answer
    group: Answer
    sequence: Answer
    operation: Answer

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong: the culprit and the cause are right, and what else it says is."""
        rest = (self.group, self.sequence, self.operation)
        return self.culprit == self.cause == "right" and "wrong" not in rest

    @property
    def is_ambiguous(self) -> bool:
        """Whether it names the culprit among others, and says that it cannot tell."""
        return self.culprit == "ambiguous"


NOTHING = Rightness(culprit="wrong", cause="wrong", group="unsaid", sequence="unsaid", operation="unsaid")
"""No verdict came."""


def assess(fault: Fault, injected: Injected | None, verdict: Verdict) -> Rightness:
    """`injected` is the last that the culprit noted; None if it could not, or did not come to it."""
    culprit: Answer = "right" if verdict.culprits == (fault.rank,) else "wrong"
    if verdict.is_ambiguous and fault.rank in verdict.culprits:
        culprit = "ambiguous"
    if fault.kind in ("link", "store") and verdict.cause in CAUSES[fault.kind] and not verdict.culprits:
        culprit = "right"  # it is no rank, but what carries the data, or the store
    cause = _answer(verdict.cause in CAUSES[fault.kind])
    if injected is None or injected.group is None:
        return Rightness(culprit=culprit, cause=cause, group="unsaid", sequence="unsaid", operation="unsaid")
    return Rightness(
        culprit=culprit,
        cause=cause,
        group="unsaid" if verdict.group is None else _answer(verdict.group == injected.group),
        sequence=_sequence(verdict, injected),
        operation=_operation(verdict, injected, is_tie=culprit == "ambiguous"),
    )


def assess_failure(fault: Fault, named_rank: int | None, *, is_its_own: bool) -> Rightness:
    """Of an error that ended the run without a verdict: whom it names, and whether it is that rank's own exception.

    A collective that was tampered with may be too much for the rank itself.
    """
    culprit = _answer(named_rank == fault.rank)
    cause = _answer(fault.state == "start" or fault.kind == "kill" or is_its_own)
    return Rightness(culprit=culprit, cause=cause, group="unsaid", sequence="unsaid", operation="unsaid")


def _sequence(verdict: Verdict, injected: Injected) -> Answer:
    if verdict.sequence is None or injected.sequence is None:
        return "unsaid"
    if injected.is_exact:
        return _answer(verdict.sequence == injected.sequence)
    return _answer(verdict.sequence >= injected.sequence and verdict.step in (injected.step, injected.step + 1))


def _operation(verdict: Verdict, injected: Injected, *, is_tie: bool) -> Answer:
    """In a tie the two may be the other way round."""
    said, done = {verdict.theirs, verdict.peers} - {None}, {injected.theirs, injected.peers} - {None}
    if not said or not done or not injected.is_exact:
        return "unsaid"
    if is_tie:
        return _answer(done <= said)
    pairs = ((verdict.theirs, injected.theirs), (verdict.peers, injected.peers))
    compared = [one == other for one, other in pairs if one is not None and other is not None]
    return _answer(all(compared)) if compared else "unsaid"


def _answer(is_right: bool) -> Answer:
    return "right" if is_right else "wrong"
