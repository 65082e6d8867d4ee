"""How many verdicts were right, and how soon they came: tables over many outcomes. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from phalanx.testing.chaos import Outcome
from phalanx.testing.faults import KINDS

_ASPECTS = ("culprit", "cause", "group", "sequence", "operation")

Columns = Sequence[tuple[str, Callable[[Outcome], str]]]


def table(outcomes: Sequence[Outcome], key: Callable[[Outcome], str], title: str) -> str:
    """Markdown, a line for each value of `key` and one for all: times in ms, and of what is said the share that is
    right."""
    found = {key(outcome) for outcome in outcomes}
    names = [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))
    rows = [(name, [outcome for outcome in outcomes if key(outcome) == name]) for name in names]
    lines = [f"| {title} | faults | median | p99 | {' | '.join(_ASPECTS)} | ambiguous | none |", "|---" * 10 + "|"]
    return "\n".join([*lines, *(_line(name, some) for name, some in (*rows, ("all", outcomes)))])


def happened(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Without those whose fault never came to be."""
    return [outcome for outcome in outcomes if outcome.injected is not None]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below so large a share of all."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    times_ms = [outcome.told_after_s * 1e3 for outcome in outcomes if outcome.told_after_s is not None]
    cells = [name, str(len(outcomes))]
    cells += [f"{statistics.median(times_ms):.0f}", f"{percentile(times_ms, 0.99):.0f}"] if times_ms else ["", ""]
    cells += [_share([getattr(outcome.rightness, aspect) for outcome in outcomes]) for aspect in _ASPECTS]
    cells.append(str(sum(outcome.rightness.is_ambiguous for outcome in outcomes)))
    cells.append(str(sum(outcome.told_after_s is None for outcome in outcomes)))
    return f"| {' | '.join(cells)} |"


def _share(answers: Sequence[str]) -> str:
    """Of those that are right or wrong: an ambiguous culprit is counted by itself, what is unsaid not at all."""
    counted = [answer for answer in answers if answer in ("right", "wrong")]
    if not counted:
        return ""
    right = counted.count("right")
    return "100 %" if right == len(counted) else f"{right} of {len(counted)}"
