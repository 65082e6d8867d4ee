"""What a verdict says is compared with what was done."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.ledger.verdict import Verdict
from phalanx.testing.faults import Fault, Injected
from phalanx.testing.oracle import assess, assess_failure

SHAPE = Fault(kind="shape", rank=1)
DONE = Injected(at_ns=1, step=3, group="tp@0", sequence=7, theirs="sum [1, 71]", peers="sum [1, 72]")
SAID: dict[str, Any] = {
    "cause": "diverged",
    "culprits": (1,),
    "nodes": ("here",),
    "what": "",
    "step": 3,
    "group": "tp@0",
    "sequence": 7,
    "theirs": "sum [1, 71]",
    "peers": "sum [1, 72]",
}


def test_all_right() -> None:
    rightness = assess(SHAPE, DONE, Verdict(**SAID))
    assert rightness.is_right and not rightness.is_ambiguous
    assert {rightness.group, rightness.sequence, rightness.operation} == {"right"}


@pytest.mark.parametrize(
    ("aspect", "said"),
    [
        ("culprit", {"culprits": (0,)}),
        ("culprit", {"culprits": (0, 2), "nodes": ("here", "here")}),
        ("cause", {"cause": "late"}),
        ("group", {"group": "dp@0"}),
        ("sequence", {"sequence": 8}),
        ("operation", {"theirs": "sum [1, 72]"}),
        ("operation", {"peers": "sum [1, 71]"}),
    ],
)
def test_one_thing_wrong(aspect: str, said: dict[str, Any]) -> None:
    rightness = assess(SHAPE, DONE, Verdict(**{**SAID, **said}))
    assert getattr(rightness, aspect) == "wrong" and not rightness.is_right


def test_a_tie_is_neither_right_nor_wrong() -> None:
    tie = {**SAID, "culprits": (0, 1), "nodes": ("here", "here"), "theirs": "sum [1, 72]", "peers": "sum [1, 71]"}
    rightness = assess(SHAPE, DONE, Verdict(**tie))
    assert rightness.is_ambiguous and not rightness.is_right
    assert rightness.operation == "right"


def test_what_is_not_said_is_not_wrong() -> None:
    gone = Verdict(cause="gone", culprits=(1,), nodes=("here",), what="")
    rightness = assess(Fault(kind="kill", rank=1), DONE, gone)
    assert rightness.is_right
    assert {rightness.group, rightness.sequence, rightness.operation} == {"unsaid"}


def test_a_collective_that_was_left_out_shows_there_or_later_in_the_step() -> None:
    fault = Fault(kind="skip", rank=1)
    done = Injected(at_ns=1, step=3, group="tp@0", sequence=5, peers="sum [1, 72]", is_exact=False)
    assert assess(fault, done, Verdict(**SAID)).is_right
    for said in ({"sequence": 4}, {"step": 5}):
        assert assess(fault, done, Verdict(**{**SAID, **said})).sequence == "wrong"


@pytest.mark.parametrize(
    ("rank", "is_its_own", "is_right"), [(1, True, True), (0, True, False), (1, False, False), (None, False, False)]
)
def test_a_rank_that_tells_its_own_exception(rank: int | None, is_its_own: bool, is_right: bool) -> None:
    fault = Fault(kind="error", rank=1)
    assert assess_failure(fault, rank, is_its_own=is_its_own).is_right == is_right
