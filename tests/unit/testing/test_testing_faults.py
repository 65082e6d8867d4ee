"""Plans of faults: the same for the same seed, fair to all ranks, and refused where they cannot happen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import pytest

from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.testing.faults import KINDS, OF_A_PROCESS, OF_A_START, Fault, FaultPlan, Kind, World

FOUR = World(4)
EXPERTS = {"enable_expert_parallel": True}
NEARLY_ALL = set(KINDS) - {"early-return", "reorder", "link", "store"}
"""Can happen to any ranks."""


def test_a_seed_is_a_plan() -> None:
    assert FaultPlan.of_seed(7, 50, FOUR) == FaultPlan.of_seed(7, 50, FOUR) != FaultPlan.of_seed(8, 50, FOUR)
    assert FaultPlan.of_seed(7, 50, FOUR).faults[:20] == FaultPlan.of_seed(7, 20, FOUR).faults


def test_every_rank_and_every_kind_has_its_share() -> None:
    faults = FaultPlan.of_seed(1, 4800, World.unknown(8)).faults
    ranks, kinds = Counter(fault.rank for fault in faults), Counter(fault.kind for fault in faults)
    assert set(ranks) == set(range(8)) and min(ranks.values()) > 500
    assert set(kinds) == set(KINDS) - {"store"} and min(kinds.values()) > 270
    assert {fault.kind for fault in faults if fault.state == "idle"} == OF_A_PROCESS


def test_what_cannot_happen_is_not_planned() -> None:
    for fault in FaultPlan.of_seed(1, 500, FOUR).faults:
        fault.check(FOUR)
    assert {fault.kind for fault in FaultPlan.of_seed(1, 100, FOUR, states=("start",)).faults} == OF_A_START - {"store"}
    with pytest.raises(ConfigError, match="kinds: 'skip' is not possible: none of them can happen in idle"):
        FaultPlan.of_seed(1, 1, FOUR, kinds=("skip",), states=("idle",))


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
        (Fault(kind="reorder", rank=0), "kind"),
        (Fault(kind="link", rank=0), "kind"),
        (Fault(kind="store", rank=0, state="start"), "kind"),
    ],
)
def test_a_fault_that_cannot_happen_here_is_refused(fault: Fault, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fault.check(FOUR)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"tensor_parallel_size": 4}, set()),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, set()),
        ({"tensor_parallel_size": 2, "collective_backend": "gloo"}, {"link", "store"}),
        ({"tensor_parallel_size": 2, "launcher": "ray", "collective_backend": "gloo"}, set()),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, {"early-return"}),
        (
            {"data_parallel_size": 2, "tensor_parallel_size": 2, "all2all_backend": "alltoall", **EXPERTS},
            {"early-return", "reorder"},
        ),
    ],
)
def test_what_can_happen_to_an_engine(settings: dict[str, Any], kinds: set[Kind]) -> None:
    world = World.of(Config.build(model="m", **settings))
    assert {kind for kind in KINDS if world.why_not(kind) is None} - NEARLY_ALL == kinds


def test_a_store_hangs_only_while_ranks_meet() -> None:
    world = World(2, has_connections=True)
    Fault(kind="store", rank=0, state="start").check(world)
    with pytest.raises(ConfigError, match="only in state start"):
        Fault(kind="store", rank=0).check(world)
    faults = FaultPlan.of_seed(1, 50, world, kinds=("store", "kill"), states=("start", "decode")).faults
    assert {fault.state for fault in faults if fault.kind == "store"} == {"start"}


def test_why_a_link_cannot_be_cut_is_said() -> None:
    with pytest.raises(ConfigError, match="link: only over connections that ranks have"):
        FaultPlan.of_seed(1, 1, FOUR, kinds=("link",))
