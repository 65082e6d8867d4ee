"""How an instance is shown: who is in what, who waits for whom, and who is to blame."""

from __future__ import annotations

import json
import time

import msgspec
import pytest
from ledger_instances import hung, instance_of, reported
from ledger_ranks import WritingRank, look_at

from phalanx.ledger.elsewhere import NodeSeen, Word
from phalanx.ledger.status import GroupStatus, InstanceStatus, instance_status, with_stacks

GROUPS = {"tp@0": [0, 1]}


def group_of(status: InstanceStatus, rank: int, group: str) -> GroupStatus:
    return next(one for one in status.ranks[rank].groups if one.group == group)


def test_who_waits_for_whom() -> None:
    status = hung()
    waits, awaited, absent = status.ranks
    assert (waits.waits_for, waits.process, waits.phase, waits.step) == ((1,), "running", "stepping", 7)
    assert (awaited.waits_for, awaited.process) == ((), "stopped")
    assert (absent.process, absent.pid, absent.phase) == ("not begun", None, "not begun")
    assert waits.step_s is not None and waits.phase_s is not None
    its_group = group_of(status, 0, "tp@0")
    assert (its_group.sequence, its_group.is_in, its_group.mark, its_group.step) == (2, True, "waits", 7)
    its_group = group_of(status, 1, "tp@0")
    assert (its_group.sequence, its_group.is_in, its_group.mark) == (1, False, "awaited")
    assert its_group.operation == "all_reduce float32 [1, 72]" and its_group.for_s is not None
    assert group_of(status, 0, "pp") == GroupStatus(group="pp", sequence=0)
    assert status.up_s == 60.0


@pytest.mark.parametrize("group", ["tp@0", None])
def test_the_culprit_is_marked_where_it_is_awaited(group: str | None) -> None:
    status = hung(reported(1, group))
    assert [rank.is_culprit for rank in status.ranks] == [False, True, False]
    assert group_of(status, 1, "tp@0").mark == "culprit"
    assert group_of(status, 0, "tp@0").mark == "waits" and group_of(status, 0, "pp").mark == ""


def test_a_divergence_is_marked_though_nobody_waits() -> None:
    groups = {"tp@0": [0, 1]}
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(2)]
    for rank, what in zip(ranks, ("all_reduce", "broadcast"), strict=True):
        rank.begin(1)
        rank.issue("tp@0", what)
    status = instance_status(
        instance_of(2, groups), look_at(ranks, groups), process="running", now=0.0, verdict=reported(1, "tp@0")
    )
    assert [group_of(status, rank, "tp@0").mark for rank in range(2)] == ["", "culprit"]
    assert [group_of(status, rank, "tp@0").operation for rank in range(2)] == ["all_reduce", "broadcast"]


def test_a_collective_that_the_journal_has_forgotten_keeps_its_number() -> None:
    groups = {"rare": [0, 1], "often": [0, 1]}
    ranks = [WritingRank(rank, list(groups)) for rank in range(2)]
    for rank in ranks:
        rank.collective("rare", "broadcast")
        for _ in range(1100):
            rank.collective("often", "all_reduce")
    status = instance_status(instance_of(2, groups), look_at(ranks, groups), process="running", now=0.0)
    assert group_of(status, 0, "rare") == GroupStatus(group="rare", sequence=1)
    assert group_of(status, 0, "often").sequence == 1100


def test_stacks_of_those_that_answer() -> None:
    status = with_stacks(hung(), {0: ("a.py:1 in f",)}, ("b.py:2 in g",))
    assert [rank.stack for rank in status.ranks] == [("a.py:1 in f",), (), ()]
    assert status.stack == ("b.py:2 in g",)


def elsewhere(rank: WritingRank, word: Word = "heard", seen_ns: int | None = None) -> NodeSeen:
    """A rank of node beta, as the judge has heard of it just now."""
    seen_ns = time.monotonic_ns() if seen_ns is None else seen_ns
    looks = (msgspec.structs.replace(rank.look(), node="beta"),) if word != "unwatched" else ()
    return NodeSeen(node="beta", ranks=(rank.rank,), word=word, seen_ns=seen_ns, looks=looks)


def spread(node: NodeSeen, ranks: list[WritingRank]) -> InstanceStatus:
    """Rank 0 is on this host, rank 1 on another one."""
    instance = instance_of(2, GROUPS)
    assert instance.order is not None
    instance = msgspec.structs.replace(
        instance, order=msgspec.structs.replace(instance.order, ranks=instance.order.ranks[:1])
    )
    return instance_status(instance, look_at(ranks[:1], GROUPS), process="running", now=0.0, elsewhere=[node])


def test_ranks_on_other_nodes_are_shown_as_the_judge_has_heard_of_them() -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(2)]
    for rank in ranks:
        rank.begin(7)
        rank.collective("tp@0", "all_reduce")
    ranks[0].issue("tp@0", "all_gather")
    here, there = spread(elsewhere(ranks[1]), ranks).ranks
    assert (here.is_here, here.seen_s, here.waits_for) == (True, None, (1,))
    assert (there.is_here, there.node, there.process, there.phase, there.step) == (
        False,
        "beta",
        "running",
        "stepping",
        7,
    )
    assert there.seen_s is not None and there.pid == ranks[1].look().entries.pid
    assert (there.groups[0].operation, there.groups[0].mark) == ("all_reduce", "awaited")
    assert with_stacks(spread(elsewhere(ranks[1]), ranks), {}, ()).ranks[1].stack is None, "it was not asked"


def test_who_was_heard_of_before_somebody_came_may_have_come_as_well() -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(2)]
    node = elsewhere(ranks[1])
    ranks[0].begin(1)
    ranks[0].issue("tp@0", "all_reduce")
    here, there = spread(node, ranks).ranks
    assert (here.waits_for, here.groups[0].mark, there.groups[0].mark) == ((), "", "")
    assert here.waits_in == "all_reduce"


@pytest.mark.parametrize(
    ("word", "process", "step"), [("lost", "not heard of", 3), ("unwatched", "not watched", 0), ("heard", "running", 3)]
)
def test_what_is_known_of_a_node(word: Word, process: str, step: int) -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(2)]
    ranks[1].begin(3)
    there = spread(elsewhere(ranks[1], word), ranks).ranks[1]
    assert (there.process, there.step) == (process, step)


def test_it_is_json() -> None:
    encoded = msgspec.json.encode(hung(reported(1)))
    assert msgspec.json.decode(encoded, type=InstanceStatus) == msgspec.json.decode(encoded, type=InstanceStatus)
    told = json.loads(encoded)
    assert told["verdict"]["since"] == "2030-01-01T12:00:00Z" and told["verdict"]["culprits"] == [1]
