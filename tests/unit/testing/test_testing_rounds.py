"""Rounds as tables."""

from __future__ import annotations

from phalanx.testing.blows import Blow
from phalanx.testing.checker import Round
from phalanx.testing.rounds import heading, kills_table, quantile, row, rungs, table


def found(index: int, *violations: str, **fields: object) -> Round:
    blow = Blow(kind="kill", rank=1, state="decode", step=2)
    made = {
        "rungs": ("standby",),
        "pause_s": 0.1 * (index + 1),
        "gap_s": 0.2,
        "again_s": 0.15,
        "num_streams": 8,
        **fields,
    }
    return Round(index=index, blow=blow, has_happened=True, violations=violations, **made)  # type: ignore[arg-type]


def test_a_row() -> None:
    assert " ".join(heading().split()) == "round blow rank when healed by pause ms gap ms again ms s result"
    assert row(found(3)).split() == ["3", "kill", "1", "decode", "2", "standby", "400", "200", "150", "0.0", "right"]
    assert row(found(3, "stream 1: it ended 0 times", "left over: 1")).endswith("it ended 0 times; left over: 1")


def test_a_table_adds_up() -> None:
    lines = table([found(0), found(1, "wrong"), found(2)], lambda one: one.blow.kind, "blow").splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["kill", "3", "24", "200", "300", "300", "200", "200", "1"]
    assert rungs([found(0), found(1, rungs=("new line", "standby"))]) == "new line 1, standby 2"


def test_a_table_of_kills_tells_what_was_wrong_and_what_a_standby_line_saves() -> None:
    never = Round(index=9, blow=Blow(kind="kill", rank=0), has_happened=False, violations=())
    rounds = [
        (found(0, gap_s=0.5), False),
        (found(1, gap_s=0.1), True),
        (found(2, "stream 1: token 3 differs", "left over: 1", "late", gap_s=0.3, num_wrong=1, num_left=1), True),
        (never, False),
    ]
    lines = kills_table(rounds, lambda one: (one.blow.kind, "here"), ("kill", "where")).splitlines()
    assert len(lines) == 3
    assert lines[2] == "| kill | here | 3 | 500 | 500 | 200 | 300 | 24 | 1 | 0 | 1 | 1 |"


def test_quantiles_of_few() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0, 2.0, 30.0], 0.5) == 2.0 and quantile([1.0, 2.0, 30.0], 0.99) == 30.0
