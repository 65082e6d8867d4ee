"""Ranks that issue different collectives: what only their digests tell, and what an agreement turns into an error."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from phalanx.collectives.agreement import agreement
from phalanx.collectives.group import Group
from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.rendezvous import Rendezvous, open_rendezvous
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import CollectiveMismatchError, DeadlineError
from phalanx.ledger.disagreement import Member, disagreement
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.step_digests import BOARD_BYTES, Issued, StepDigests, told
from phalanx.testing.thread_exchange import ThreadExchange
from phalanx.testing.thread_group import ThreadGroup, run_ranks

MEMBERS = (Member(0, 1), Member(1, 1))


def disagree(program: Callable[[Group], None]) -> bool:
    """Whether two ranks whose step is `program` have issued the same."""

    def run(group: Group) -> Issued:
        digests = StepDigests(memoryview(bytearray(BOARD_BYTES)), 1)
        digests.begin(1)
        program(JournaledGroup(group, group_notes(1, None, digests)))
        return told(digests.leave())

    return disagreement(1, "tp", MEMBERS, dict(enumerate(run_ranks(2, run)))) is not None


def test_ranks_that_do_the_same_agree() -> None:
    def program(group: Group) -> None:
        group.all_reduce(torch.ones(3) * group.rank)
        group.all_gather(torch.ones(2, 2), dim=-1)
        group.all_to_all(torch.ones(1, 2), [1 - group.rank, group.rank], [1, 0] if not group.rank else [0, 1])
        group.barrier()

    assert not disagree(program)


def test_a_broadcast_from_another_rank_hangs_nobody_and_is_found() -> None:
    got = []

    def program(group: Group) -> None:
        got.append(group.broadcast(torch.full((1,), group.rank), src=group.rank).item())

    assert disagree(program)
    assert sorted(got) == [0, 1], "each has its own: nobody noticed"


def test_a_gather_along_another_dimension_hangs_nobody_and_is_found() -> None:
    def program(group: Group) -> None:
        group.all_gather(torch.ones(2, 2), dim=group.rank)

    assert disagree(program)


def test_a_collective_that_one_rank_issues_a_step_later_is_found() -> None:
    def run(group: Group) -> list[Issued]:
        digests = StepDigests(memoryview(bytearray(BOARD_BYTES)), 1)
        journaled, issued = JournaledGroup(group, group_notes(1, None, digests)), []
        for step in (1, 2):
            digests.begin(step)
            for _ in range(1 if step == 1 + group.rank else 0):
                journaled.barrier()
            issued.append(told(digests.leave()))
        return issued

    first, second = run_ranks(2, run)
    assert disagreement(1, "tp", MEMBERS, {0: first[0], 1: second[0]}) is not None
    assert disagreement(2, "tp", MEMBERS, {0: first[1], 1: second[1]}) is not None


def _agreeing(size: int, spans_hosts: bool, timeout_s: float, resources: ExitStack) -> GroupSpec:
    ranks = tuple(range(3, 3 + size))
    if spans_hosts:
        return GroupSpec("tp", "nccl", ranks, 7, timeout_s, join_timeout_s=20.0, agrees=True)
    rendezvous: Rendezvous = open_rendezvous("tp", "gloo", ranks, 7, timeout_s, join_timeout_s=20.0, agrees=True)
    return resources.enter_context(rendezvous).spec


def run_agreeing(
    spans_hosts: bool, program: Callable[[Group], object], size: int = 2, timeout_s: float = 20.0
) -> list[Future[object]]:
    """What becomes of `program(group)` on each rank. The groups themselves are threads', which do not care."""
    with ExitStack() as resources:
        spec = _agreeing(size, spans_hosts, timeout_s, resources)

        def run(rank: int, exchange: ThreadExchange, group: ThreadGroup) -> object:
            agreed = agreement(spec, rank, exchange)
            assert agreed is not None
            try:
                return program(JournaledGroup(group, group_notes(1, None, None), agreed))
            finally:
                agreed.close()

        with ThreadPoolExecutor(size) as threads:
            everybody = zip(spec.ranks, ThreadExchange.make(size), ThreadGroup.make(size), strict=True)
            return [threads.submit(run, *of_rank) for of_rank in everybody]


WHEREVER = pytest.mark.parametrize("spans_hosts", [False, True], ids=["one host", "several hosts"])


@WHEREVER
def test_ranks_that_agree_go_on(spans_hosts: bool) -> None:
    def program(group: Group) -> float:
        group.broadcast(torch.zeros(1), src=0)
        return group.all_reduce(torch.ones(3))[0].item()

    assert [future.result() for future in run_agreeing(spans_hosts, program, size=3)] == [3.0, 3.0, 3.0]


@WHEREVER
def test_another_collective_is_an_error_in_every_rank_at_the_call(spans_hosts: bool) -> None:
    came_through = []

    def program(group: Group) -> None:
        group.barrier()
        came_through.append(group.rank)
        group.broadcast(torch.zeros(1), src=group.rank)

    futures = run_agreeing(spans_hosts, program)
    for future in futures:
        error = future.exception()
        assert isinstance(error, CollectiveMismatchError)
        where = "at sequence 2 of group tp, epoch 7"
        met = [f"rank {3 + rank} is in broadcast float32 [1] src={rank}" for rank in (0, 1)]
        assert str(error) == f"{where}: {'; '.join(met)}"
    assert sorted(came_through) == [0, 1]


@WHEREVER
def test_a_skipped_collective_is_an_error_at_the_next_one(spans_hosts: bool) -> None:
    def program(group: Group) -> None:
        if group.rank == 0:
            group.all_reduce(torch.ones(3))
        group.barrier()

    for future in run_agreeing(spans_hosts, program):
        error = future.exception()
        assert isinstance(error, CollectiveMismatchError), error
        assert "rank 3 is in all_reduce float32 [3]; rank 4 is in barrier" in str(error)


@WHEREVER
def test_a_hang_is_an_error_within_the_deadline(spans_hosts: bool) -> None:
    is_told, took_s = [], []

    def program(group: Group) -> None:
        if group.rank == 0:
            began_at = time.monotonic()
            try:
                group.barrier()
            finally:
                took_s.append(time.monotonic() - began_at)
                is_told.append(True)
        while not is_told:
            time.sleep(0.01)

    waits, _ = run_agreeing(spans_hosts, program, timeout_s=0.5)
    error = waits.exception()
    assert isinstance(error, DeadlineError) and "rank 4 (pid" in str(error), error
    assert 0.45 < took_s[0] < 10.0


def test_other_groups_have_no_agreement() -> None:
    spec = GroupSpec("tp", "gloo", (0, 1), 7, 1.0, 1.0)
    assert agreement(spec, 0, None) is None
    assert agreement(GroupSpec("tp", "single", (0,), 7, 1.0, 1.0, agrees=True), 0, None) is None
