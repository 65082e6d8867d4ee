"""Blows from a seed, and whether what is told of one names whom it hit."""

from __future__ import annotations

import pytest

from phalanx.errors import ConfigError
from phalanx.testing.blows import BLOW_KINDS, ENDS, MOMENTS, Blow, BlowKind, blow_of_seed, is_named
from phalanx.testing.faults import OF_A_PROCESS, World

WORLD = World(4, has_experts=True, shares_groups=True, has_connections=True, can_shrink=True, has_memory_limits=True)


def drawn(world: World = WORLD, *, has_standby: bool = True, count: int = 400) -> list[Blow]:
    return [blow_of_seed(3, index, world, has_standby=has_standby) for index in range(count)]


def test_the_same_seed_and_number_give_the_same_blow() -> None:
    assert drawn() == drawn() and blow_of_seed(4, 0, WORLD, has_standby=True) != drawn()[0]


def test_every_kind_comes_at_every_moment_that_it_can() -> None:
    found = {(blow.kind, blow.state) for blow in drawn(count=3000)}
    never = {"kill-owner", "kill-server"}
    assert {kind for kind, _ in found} == set(BLOW_KINDS) - never
    assert {state for kind, state in found if kind == "kill"} == set(MOMENTS)
    assert {state for kind, state in found if kind == "skip"} == {"prefill", "decode"}
    assert {kind for kind, state in found if state == "any"} == {"kill", "stop", *ENDS} - never
    assert {kind for kind, state in found if state == "idle"} == set(OF_A_PROCESS)
    assert {blow.rank for blow in drawn()} == {0, 1, 2, 3}


def test_what_cannot_be_is_left_out() -> None:
    alone = World(2)
    kinds = {blow.kind for blow in drawn(alone, has_standby=False)}
    assert not kinds & {"kill-standby", "early-return", "reorder", "link"} and "kill-switch" in kinds
    assert not kinds & {"kill-both", "kill-resize", "kill-owner", "kill-server"}
    of_actors = {blow.kind for blow in drawn(World(2, has_agents=True), has_standby=False)}
    assert "kill-owner" in of_actors and "kill-lines" not in of_actors
    with pytest.raises(ConfigError, match=r"none .* here in any; kill-owner takes --launcher ray; kill-server takes a"):
        blow_of_seed(1, 0, World(size=2), has_standby=True, kinds=("kill-owner", "kill-server"), states=("any",))
    with pytest.raises(ConfigError, match="none of them can happen here in idle"):
        blow_of_seed(1, 0, alone, has_standby=False, kinds=("skip", "kill-standby"), states=("idle",))


def test_whoever_is_hurt_from_outside_does_nothing_itself() -> None:
    assert Blow(kind="kill", rank=1).fault is None
    fault = Blow(kind="stop", rank=1, state="prefill", step=2, collective=7).fault
    assert fault is not None and (fault.kind, fault.state, fault.step, fault.collective) == ("stop", "prefill", 2, 7)


@pytest.mark.parametrize(
    ("kind", "said", "is_right"),
    [
        ("kill", "rank 1 (pid 7) died: killed by SIGKILL", True),
        ("kill", "rank 0 (pid 7) died: killed by SIGKILL", False),
        ("kill", "rank 12 (pid 7) died", False),
        ("oom", "rank 1 (pid 7) died: killed by SIGKILL; since it began, the kernel has killed on this host", True),
        ("oom", "rank 1 (pid 7) died: killed by SIGKILL, not by the kernel for lack of memory", False),
        ("kill", "waited 60 s for step 3 from rank 1", False),
        ("stop", "rank 1 on here is stopped by a signal, while stepping; rank 0 waited for 0.5 s", True),
        ("skip", "rank 0 on here or rank 1 on here issued x; which of them is wrong cannot be told", True),
        ("skip", "rank 0 on here or rank 1 on here issued x", False),
        ("kill", "rank 0 on here or rank 1 on here issued x; which of them is wrong cannot be told", False),
        ("kill-lines", "rank 0 (pid 7) died: its fork server ended: killed by SIGKILL", True),
        ("kill-both", "rank 0 (pid 7) died: killed by SIGKILL", True),
        ("kill-reload", "rank 0 (pid 7) died: killed by SIGKILL", False),
        ("kill-owner", "node beta (rank 1) (pid 256) died: its link broke", True),
        ("kill-owner", "waited 60 s for step 3", False),
        ("link", "ranks 0, 1 have all come to x, which does not end: to blame is no rank, but what carries it", True),
    ],
)
def test_who_is_named(kind: BlowKind, said: str, is_right: bool) -> None:
    assert is_named(Blow(kind=kind, rank=1), said) == is_right
