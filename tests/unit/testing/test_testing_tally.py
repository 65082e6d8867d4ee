"""Times of verdicts beside how soon they are to come."""

from __future__ import annotations

import pytest

from phalanx.testing.chaos import Outcome
from phalanx.testing.faults import KINDS, Fault, Injected, Kind
from phalanx.testing.oracle import NOTHING
from phalanx.testing.tally import TARGETS, targets_table


def outcome(kind: Kind, told_after_s: float | None, step_s: float | None = 0.01) -> Outcome:
    return Outcome(
        fault=Fault(kind=kind, rank=0),
        injected=Injected(at_ns=1),
        verdict=None,
        error="",
        told_after_s=told_after_s,
        rightness=NOTHING,
        took_s=1.0,
        step_s=step_s,
    )


def test_every_kind_that_is_judged_has_a_target() -> None:
    kinds = [kind for target in TARGETS for kind in target.kinds]
    assert sorted(kinds) == sorted(set(KINDS) - {"error", "store"})


@pytest.mark.parametrize(
    ("kind", "step_s", "within_s", "beyond_s"),
    [
        ("kill", 9.0, 0.1, 0.11),
        ("wedge", 9.0, 1.0, 1.1),
        ("slow", 0.01, 1.0, 1.1),
        ("slow", 0.1, 2.0, 2.1),
        ("swap", 0.01, 0.11, 0.12),
    ],
)
def test_what_is_in_time(kind: Kind, step_s: float, within_s: float, beyond_s: float) -> None:
    table = targets_table([outcome(kind, within_s, step_s), outcome(kind, beyond_s, step_s), outcome(kind, None)])
    *_, line = table.splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert (cells[1], cells[3], cells[-2], cells[-1]) == (kind, "3", "1 of 3", "1")
    assert cells[5] == f"{beyond_s * 1e3:.0f}"


def test_what_has_no_target_is_not_in_the_table() -> None:
    table = targets_table([outcome("error", 0.1), outcome("kill", 0.05, step_s=None)])
    assert len(table.splitlines()) == 2
