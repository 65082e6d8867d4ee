"""Plans of faults: the same for the same seed, fair to all ranks, and refused where they cannot happen."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from phalanx.errors import ConfigError
from phalanx.testing.faults import KINDS, OF_A_PROCESS, OF_A_START, Fault, FaultPlan


def test_a_seed_is_a_plan() -> None:
    assert FaultPlan.of_seed(7, 50, 4) == FaultPlan.of_seed(7, 50, 4) != FaultPlan.of_seed(8, 50, 4)
    assert FaultPlan.of_seed(7, 50, 4).faults[:20] == FaultPlan.of_seed(7, 20, 4).faults


def test_every_rank_and_every_kind_has_its_share() -> None:
    faults = FaultPlan.of_seed(1, 4800, 8, has_experts=True).faults
    ranks, kinds = Counter(fault.rank for fault in faults), Counter(fault.kind for fault in faults)
    assert set(ranks) == set(range(8)) and min(ranks.values()) > 500
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 320
    assert {fault.kind for fault in faults if fault.state == "idle"} == OF_A_PROCESS


def test_what_cannot_happen_is_not_planned() -> None:
    for fault in FaultPlan.of_seed(1, 500, 4).faults:
        fault.check(4, has_experts=False)
    assert {fault.kind for fault in FaultPlan.of_seed(1, 100, 4, states=("start",)).faults} == OF_A_START
    with pytest.raises(ConfigError, match="kinds: 'skip' is not possible: none of them can happen in idle"):
        FaultPlan.of_seed(1, 1, 4, kinds=("skip",), states=("idle",))


@pytest.mark.parametrize(
    "text",
    [
        '{"faults": [{"kind": "stop", "rank": 2, "state": "prefill", "seconds": 2.5}]}',
        '[[faults]]\nkind = "stop"\nrank = 2\nstate = "prefill"\nseconds = 2.5\n',
    ],
)
def test_a_text_is_a_plan(text: str) -> None:
    plan = FaultPlan.parse(text)
    assert plan == FaultPlan(faults=(Fault(kind="stop", rank=2, state="prefill", seconds=2.5),))
    assert FaultPlan.parse(msgspec.json.encode(plan).decode()) == plan


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[faults]]\nkind = "explode"\nrank = 2\n', "explode"),
        ('[[faults]]\nkind = "stop"\nrank = -1\n', ">= 0"),
        ('[[faults]]\nkind = "stop"\nrank = 1\nsec = 1\n', "sec"),
        ("faults = [", "plan"),
        ('{"faults": 1}', "array"),
    ],
)
def test_a_wrong_text_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        FaultPlan.parse(text)


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (Fault(kind="kill", rank=4), "rank"),
        (Fault(kind="early-return", rank=0), "kind"),
        (Fault(kind="skip", rank=0, state="idle"), "kind"),
        (Fault(kind="loop", rank=0, state="start"), "kind"),
    ],
)
def test_a_fault_that_cannot_happen_here_is_refused(fault: Fault, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fault.check(4, has_experts=False)
    assert caught.value.field == field
