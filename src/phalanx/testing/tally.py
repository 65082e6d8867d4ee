"""How many verdicts were right, and how soon they came, beside what they should: tables over many outcomes. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from phalanx.testing.chaos import Outcome
from phalanx.testing.faults import KINDS, Kind

_ASPECTS = ("culprit", "cause", "group", "sequence", "operation")


class Target(NamedTuple):
    """How soon a verdict is to come."""

    event: str
    kinds: tuple[Kind, ...]
    least_s: float
    num_steps: float
    """The larger of the two counts, or their sum."""
    is_sum: bool
    words: str

    def of_s(self, step_s: float) -> float:
        """Where a step takes so long."""
        of_steps_s = self.num_steps * step_s
        return self.least_s + of_steps_s if self.is_sum else max(self.least_s, of_steps_s)


TARGETS = (
    Target("process dead", ("kill", "oom"), 0.1, 0, False, "100 ms"),
    Target("stopped, or its GIL held", ("stop", "wedge"), 1.0, 0, False, "1 s"),
    Target("collective hung, work in flight", ("loop", "slow", "link"), 1.0, 20, False, "1 s, or 20 steps"),
    Target(
        "sequences diverge",
        ("skip", "extra", "swap", "shape", "dtype", "early-return", "reorder"),
        0.1,
        1,
        True,
        "a step + 100 ms",
    ),
)
"""On a CPU."""


def table(outcomes: Sequence[Outcome], key: Callable[[Outcome], str], title: str) -> str:
    """Markdown, a line for each value of `key` and one for all: times in ms, and of what is said the share that is
    right."""
    found = {key(outcome) for outcome in outcomes}
    names = [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))
    rows = [(name, [outcome for outcome in outcomes if key(outcome) == name]) for name in names]
    lines = [f"| {title} | faults | median | p99 | {' | '.join(_ASPECTS)} | ambiguous | none |", "|---" * 10 + "|"]
    return "\n".join([*lines, *(_line(name, some) for name, some in (*rows, ("all", outcomes)))])


def targets_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown, a line for each kind: times in ms beside the target, and how many were told within it.

    Without those of the start, which have no target, and those that a rank tells of itself.
    """
    lines = ["| event | kind | target | faults | median | p99 | within | none |", "|---" * 8 + "|"]
    for target in TARGETS:
        for kind in target.kinds:
            some = [one for one in outcomes if one.fault.kind == kind and one.step_s is not None]
            if some:
                lines.append(_target_line(target, kind, some))
    return "\n".join(lines)


def happened(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Without those whose fault never came to be."""
    return [outcome for outcome in outcomes if outcome.injected is not None]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below so large a share of all."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _target_line(target: Target, kind: Kind, outcomes: Sequence[Outcome]) -> str:
    times_s = [one.told_after_s for one in outcomes if one.told_after_s is not None]
    within = sum(
        one.told_after_s is not None and one.told_after_s <= target.of_s(one.step_s or 0.0) for one in outcomes
    )
    cells = [target.event, kind, target.words, str(len(outcomes)), *_median_and_p99(times_s)]
    cells += [_of(within, len(outcomes)), str(len(outcomes) - len(times_s))]
    return f"| {' | '.join(cells)} |"


def _median_and_p99(times_s: Sequence[float]) -> list[str]:
    """In ms."""
    if not times_s:
        return ["", ""]
    return [f"{statistics.median(times_s) * 1e3:.0f}", f"{percentile(times_s, 0.99) * 1e3:.0f}"]


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    times_s = [outcome.told_after_s for outcome in outcomes if outcome.told_after_s is not None]
    cells = [name, str(len(outcomes)), *_median_and_p99(times_s)]
    cells += [_share([getattr(outcome.rightness, aspect) for outcome in outcomes]) for aspect in _ASPECTS]
    cells.append(str(sum(outcome.rightness.is_ambiguous for outcome in outcomes)))
    cells.append(str(sum(outcome.told_after_s is None for outcome in outcomes)))
    return f"| {' | '.join(cells)} |"


def _share(answers: Sequence[str]) -> str:
    """Of those that are right or wrong: an ambiguous culprit is counted by itself, what is unsaid not at all."""
    counted = [answer for answer in answers if answer in ("right", "wrong")]
    if not counted:
        return ""
    return _of(counted.count("right"), len(counted))


def _of(part: int, whole: int) -> str:
    return "100 %" if part == whole else f"{part} of {whole}"
