"""Instances, verdicts and statuses made by hand."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from ledger_ranks import WritingRank, look_at

from phalanx.ledger.instance import Instance, ServerFacts
from phalanx.ledger.report import VerdictReport
from phalanx.ledger.status import InstanceStatus, instance_status
from phalanx.ledger.verdict import Cause, Verdict
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.shared_memory import SegmentHandle

NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)


def verdict_of(cause: Cause, culprit: int, waited_s: float = 0.0) -> Verdict:
    return Verdict(cause=cause, culprits=(culprit,), nodes=("here",), what="does it", waited_s=waited_s)


def reported(culprit: int, group: str | None = None, paragraph: str = "") -> VerdictReport:
    said = paragraph or f"rank {culprit} on here does it"
    return VerdictReport(
        cause="late", culprits=(culprit,), nodes=("here",), paragraph=said, since=NOON, for_s=3.5, group=group
    )


def instance_of(num_ranks: int, groups: dict[str, Sequence[int]]) -> Instance:
    return Instance(
        pid=100,
        start_time=1,
        parent_pid=99,
        version="1",
        model="models/tiny",
        world_size=num_ranks,
        layout={"tensor_parallel_size": num_ranks},
        launcher="local",
        device="cpu",
        epoch=1,
        started_at=1000.0,
        order=WatchOrder(
            ranks=tuple(
                WatchedRank(
                    rank=rank,
                    node="here",
                    groups=("", *(name for name, members in groups.items() if rank in members)),
                    journal=SegmentHandle(1, 1, 1, 1),
                )
                for rank in range(num_ranks)
            ),
            groups={name: tuple(members) for name, members in groups.items()},
        ),
    )


def hung(verdict: VerdictReport | None = None, operation: str = "all_reduce float32 [1, 72]") -> InstanceStatus:
    """Rank 0 waits in the second collective of tp@0 for rank 1, which is in none; rank 2 has not begun."""
    groups = {"tp@0": [0, 1], "pp": [0, 2]}
    ranks = [WritingRank(0, ["tp@0", "pp"]), WritingRank(1, ["tp@0"])]
    for rank in ranks:
        rank.begin(7)
        rank.collective("tp@0", operation)
    ranks[0].issue("tp@0", operation)
    ranks[1].process = "stopped"
    return instance_status(
        instance_of(3, groups),
        look_at(ranks, groups),
        process="running",
        now=1060.0,
        server=ServerFacts(version="1", url="http://127.0.0.1:8000", model="tiny"),
        verdict=verdict,
        watcher_s=0.03,
    )
