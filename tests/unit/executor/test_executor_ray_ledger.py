"""With Ray, too, it is the guard's level that says whether a verdict ends the ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from phalanx.collectives.descriptor import Descriptor
from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.ledger import Ledger, keep_ledger, outlast_stalls
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.transport.shared_memory import SharedSegment

WITHIN_S = 60.0
GROUP = GroupSpec("tp@0", "shm", (0, 1), epoch=1, timeout_s=5.0, join_timeout_s=5.0)


class Launcher:
    """Has no processes to kill."""

    def __init__(self) -> None:
        self.killed = threading.Event()

    def kill(self) -> None:
        self.killed.set()

    def exits(self) -> dict[int, str]:
        return {}


def placed(rank: int) -> PlacedRank:
    return PlacedRank(
        rank=rank,
        replica=0,
        stage=0,
        tp_rank=rank,
        node="alpha",
        node_id="a",
        address="127.0.0.1",
        bundle=rank,
        local_rank=rank,
        ranks_on_host=2,
        devices=(),
        is_driver_node=True,
        pid=1,
        log="",
    )


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def judged(guard: str, launcher: Launcher, resources: ExitStack) -> Ledger:
    """The ledger of two ranks of this node, once it has found that they diverge."""
    processes: Any = SimpleNamespace(placed=tuple(map(placed, range(2))), ranks_of_agents=dict)
    config = Config.build(model="any", launcher="ray", tensor_parallel_size=2, collective_guard=guard)
    ledger = keep_ledger(config, processes, [GROUP], launcher, resources)  # type: ignore[arg-type]
    for rank, handle in ledger.journals.items():
        journal = Journal(resources.enter_context(SharedSegment.attach(handle)).buf, epoch=1)
        journal.enter("stepping")
        journal.begin_step(1, 7, num_tokens=1)
        group_notes(1, journal, None).issue(Descriptor("all_reduce", "float32", (10 + rank,)))
    assert ledger.watching is not None
    verdict = ledger.watching.await_verdict(WITHIN_S)
    assert verdict is not None and verdict.cause == "diverged", verdict
    return ledger


def test_a_divergence_ends_the_ranks(resources: ExitStack) -> None:
    launcher = Launcher()
    judged("digest", launcher, resources)
    assert launcher.killed.wait(WITHIN_S)


def test_not_those_that_say_so_themselves_in_the_call_that_is_wrong(resources: ExitStack) -> None:
    launcher = Launcher()
    ledger = judged("strict", launcher, resources)
    assert ledger.watching is not None
    ledger.watching.close()  # by then all that was told has been taken in
    assert not launcher.killed.is_set()


def test_a_stall_of_the_network_is_outlasted() -> None:
    asked = {"diverged": 0.0, "stopped": 0.5, "late": 0.5, "behind": 0.5, "hung": 0.5}
    patient = outlast_stalls(asked, 10.0)  # type: ignore[arg-type]
    assert patient == {"diverged": 0.0, "stopped": 0.5, "late": 10.0, "behind": 10.0, "hung": 10.0}
