"""A rank that diverges, is late, is stopped, leaves or dies: every other rank gets an error that names it, soon."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from collectives_crew import SHARING, Crew, send_rows, work_for_ever

from phalanx.collectives.group import Group

pytestmark = pytest.mark.slow

_CHECKED = ["shm", "gloo"]


def all_reduce(group: Group, dtype: str = "float32", shape: tuple[int, ...] = (2, 576)) -> float:
    return group.all_reduce(torch.ones(shape).to(getattr(torch, dtype))).sum().item()


def all_gather(group: Group, dim: int = -1) -> None:
    group.all_gather(torch.ones(2, 576), dim)


def broadcast(group: Group, src: int) -> None:
    group.broadcast(torch.ones(2, 576), src)


def barrier(group: Group) -> None:
    group.barrier()


def close(group: Group) -> None:
    group.close()


def reduce_scatter(group: Group) -> None:
    group.reduce_scatter(torch.ones(6, 576))


def all_to_all(group: Group, dtype: str = "float32", width: int = 576) -> None:
    """Each rank sends one row to each."""
    each = [1] * group.size
    group.all_to_all(torch.ones(group.size, width).to(getattr(torch, dtype)), each, each)


def sleep(_: Group) -> None:
    time.sleep(3600)


_SOON_S = 1.0
_OURS = "all_reduce float32 [2, 576]"


@pytest.mark.parametrize("backend", _CHECKED)
@pytest.mark.parametrize(
    ("task", "text"),
    [
        ((barrier,), "barrier"),
        ((all_gather,), "all_gather float32 [2, 576] dim=1"),
        ((broadcast, 1), "broadcast float32 [2, 576] src=1"),
        ((reduce_scatter,), "reduce_scatter float32 [6, 576]"),
        ((all_to_all,), "all_to_all float32 [576]"),
        ((all_reduce, "bfloat16"), "all_reduce bfloat16 [2, 576]"),
        ((all_reduce, "float32", (1152,)), "all_reduce float32 [1152]"),
        ((all_reduce, "float32", (1000, 576)), "all_reduce float32 [1000, 576]"),
    ],
    ids=["barrier", "all_gather", "broadcast", "reduce_scatter", "all_to_all", "dtype", "shape", "large"],
)
def test_a_rank_in_another_collective(backend: str, task: tuple, text: str) -> None:
    with Crew(backend, 3) as crew:
        crew.run(all_reduce)
        outcomes = crew.outcomes([(all_reduce,), (all_reduce,), task])
        for rank, outcome in enumerate(outcomes):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert "sequence 2 of group tp, epoch 3" in outcome.error.message
            assert outcome.took_s < _SOON_S
            message = outcome.error.message
            assert f"rank 2 is in {text}" in message
            assert f"rank 0 is in {_OURS}" in message or f"rank 1 is in {_OURS}" in message
            assert f"rank {rank} is in" in message
        for again in crew.outcomes([(barrier,)] * 3):
            assert again.error is not None, "a group that has failed must not work again"
            assert again.error.kind == "CollectiveMismatchError"


@pytest.mark.parametrize("backend", _CHECKED)
@pytest.mark.parametrize("task", [(all_gather, 0), (broadcast, 1)], ids=["dim", "src"])
def test_the_same_operation_with_another_argument(backend: str, task: tuple) -> None:
    ours = (task[0], 1 - task[1])
    with Crew(backend, 2) as crew:
        for outcome in crew.outcomes([ours, task]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"


@pytest.mark.parametrize("backend", _CHECKED)
@pytest.mark.parametrize("task", [(all_to_all, "bfloat16"), (all_to_all, "float32", 64)], ids=["dtype", "row"])
def test_rows_of_another_kind(backend: str, task: tuple) -> None:
    with Crew(backend, 2) as crew:
        for outcome in crew.outcomes([(all_to_all,), task]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert "rank 0 is in all_to_all float32 [576]; rank 1 is in all_to_all" in outcome.error.message


@pytest.mark.parametrize("num_rows", [1, 1000], ids=["few", "many"])
@pytest.mark.parametrize("difference", [1, -1], ids=["too few", "too many"])
@pytest.mark.parametrize("backend", _CHECKED)
def test_ranks_that_count_their_rows_differently_are_both_named(backend: str, difference: int, num_rows: int) -> None:
    counts = [[num_rows] * 3] * 3
    expected = [[num_rows] * 3, [num_rows + difference, num_rows, num_rows], [num_rows] * 3]
    with Crew(backend, 3) as crew:
        crew.run(send_rows, counts, counts)
        exactly = (
            f"in all_to_all float32 [576] rank 0 sends {num_rows} rows to rank 1, which expects {num_rows + difference}"
        )
        for outcome in crew.outcomes([(send_rows, counts, expected)] * 3):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError", outcome.error
            assert outcome.error.message == f"at sequence 2 of group tp, epoch 3: {exactly}"
            assert outcome.took_s < _SOON_S
        for again in crew.outcomes([(barrier,)] * 3):
            assert again.error is not None, "a group that has failed must not work again"


@pytest.mark.parametrize("backend", _CHECKED)
def test_a_mismatch_is_told_to_ranks_that_wait_for_a_third(backend: str) -> None:
    with Crew(backend, 3) as crew:
        crew.send(0, all_reduce)
        crew.send(2, barrier)
        for outcome in crew.answers([0, 2]):  # rank 1 has not come at all
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert outcome.took_s < _SOON_S
        crew.send(1, all_reduce)
        (late,) = crew.answers([1])
        assert late.error is not None
        assert late.error.kind == "CollectiveMismatchError"
        expected = f"rank 0 is in {_OURS}; rank 1 is in {_OURS}; rank 2 is in barrier"
        assert late.error.message.endswith(expected)


@pytest.mark.parametrize("backend", _CHECKED)
def test_ranks_that_do_not_join_are_named(backend: str) -> None:
    with Crew(backend, 4, timeout_s=0.5, absent=[1, 3]) as crew:
        for outcome in crew.joining.values():
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert "the joining of group tp, epoch 3 from rank 1, rank 3" in outcome.error.message
            assert outcome.took_s < 3.0


@pytest.mark.parametrize("backend", _CHECKED)
def test_a_rank_that_does_not_come_is_named(backend: str) -> None:
    with Crew(backend, 3, timeout_s=0.7) as crew:
        crew.send(0, all_reduce)
        crew.send(2, all_reduce)
        outcomes = crew.answers([0, 2])
        for outcome in outcomes:
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert _OURS in outcome.error.message
            assert "sequence 1 of group tp" in outcome.error.message
            assert "from rank 1 (pid" in outcome.error.message
        # Who began to wait first waits to the end; the other hears from it that it gave up.
        assert 0.6 < max(outcome.took_s for outcome in outcomes) < 3.0


@pytest.mark.parametrize("operation", SHARING)
@pytest.mark.parametrize("num_rows", [2, 2000], ids=["small", "large"])
@pytest.mark.parametrize("backend", _CHECKED)
def test_a_stopped_rank_is_named(backend: str, num_rows: int, operation: str) -> None:
    with Crew(backend, 3, timeout_s=1.0) as crew:
        for rank in range(3):
            crew.send(rank, work_for_ever, operation, num_rows)
        crew.signal(1, signal.SIGSTOP)
        outcomes = crew.answers([0, 2])
        for outcome in outcomes:
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert operation in outcome.error.message
        assert "rank 1 (pid" in outcomes[0].error.message
        crew.signal(1, signal.SIGCONT)
        (resumed,) = crew.answers([1])
        assert resumed.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize("operation", SHARING)
@pytest.mark.parametrize("num_rows", [2, 2000], ids=["small", "large"])
@pytest.mark.parametrize("backend", _CHECKED)
def test_a_killed_rank_is_named_at_once(backend: str, num_rows: int, operation: str) -> None:
    with Crew(backend, 4) as crew:
        for rank in range(4):
            crew.send(rank, work_for_ever, operation, num_rows)
        start = time.monotonic()
        crew.signal(3, signal.SIGKILL)
        for outcome in crew.answers([0, 1, 2]):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert "rank 3 (pid" in outcome.error.message
        assert time.monotonic() - start < _SOON_S


@pytest.mark.parametrize("backend", _CHECKED)
def test_a_rank_that_dies_while_others_sleep_for_a_third(backend: str) -> None:
    with Crew(backend, 3) as crew:
        crew.send(0, barrier)
        crew.send(1, sleep)  # alive, and late
        crew.send(2, sleep)
        crew.signal(2, signal.SIGKILL)
        (outcome,) = crew.answers([0])
        assert outcome.error is not None
        assert outcome.error.kind == "PeerDiedError"
        assert "rank 2 (pid" in outcome.error.message
        assert outcome.took_s < _SOON_S


@pytest.mark.parametrize("backend", _CHECKED)
def test_a_rank_that_leaves_is_named(backend: str) -> None:
    with Crew(backend, 3) as crew:
        crew.run(barrier)
        outcomes = crew.outcomes([(all_reduce,), (all_reduce,), (close,)])
        assert outcomes[2].error is None
        for rank, outcome in enumerate(outcomes[:2]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert "rank 2 has left group tp, epoch 3" in outcome.error.message
            assert f"rank {rank} is in {_OURS}" in outcome.error.message
            assert outcome.took_s < _SOON_S


def last_sum_and_exit(group: Group) -> None:
    all_reduce(group)
    os._exit(0)


@pytest.mark.parametrize("backend", _CHECKED)
def test_a_rank_may_exit_right_after_its_last_collective(backend: str) -> None:
    for _ in range(3):
        with Crew(backend, 3) as crew:
            crew.send(0, all_reduce)
            crew.send(1, all_reduce)
            crew.send(2, last_sum_and_exit)
            assert [outcome.value for outcome in crew.answers([0, 1])] == [3.0 * 1152] * 2


def sum_on_gpu_and_meet(group: Group) -> None:
    group.all_reduce(torch.ones(1000, device="cuda"))
    group.barrier()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_on_gpus_a_barrier_names_the_rank_that_is_dead_or_late() -> None:
    with Crew("nccl", 2, timeout_s=3.0) as crew:
        crew.send(0, sum_on_gpu_and_meet)
        (late,) = crew.answers([0])
        assert late.error is not None
        assert late.error.kind == "DeadlineError"
        assert "from rank 1 (pid" in late.error.message
    with Crew("nccl", 2) as crew:
        crew.send(0, sum_on_gpu_and_meet)
        crew.send(1, sleep)
        crew.signal(1, signal.SIGKILL)
        (bereft,) = crew.answers([0])
        assert bereft.error is not None
        assert bereft.error.kind == "PeerDiedError"
        crew.send(0, close)
        (closing,) = crew.answers([0])
        assert closing.error is None
        assert closing.took_s < 5 * _SOON_S, "leaving a group must not wait for its dead"


def fails_in_between(group: Group) -> None:
    # Memory that overlaps itself cannot be written: torch refuses it when the sum is there.
    group.all_reduce(torch.ones(1, 1).expand(2, 576))


def test_an_exception_inside_a_collective_ends_the_group() -> None:
    with Crew("shm", 2) as crew:
        failed, fine = crew.outcomes([(fails_in_between,), (all_reduce,)])
        assert failed.error is not None
        assert failed.error.kind == "RuntimeError"
        assert fine.error is None, "its own sum was complete"
        for rank, outcome in enumerate(crew.outcomes([(barrier,)] * 2)):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert ("left half done" if rank == 0 else "rank 0 has left group tp") in outcome.error.message


@pytest.mark.parametrize("operation", SHARING)
@pytest.mark.parametrize("num_rows", [1, 300], ids=["small", "large"])
def test_a_kill_at_any_moment_is_noticed_by_all(num_rows: int, operation: str) -> None:
    dice = random.Random(5)
    for _ in range(15):
        with Crew("shm", 4) as crew:
            for rank in range(4):
                crew.send(rank, work_for_ever, operation, num_rows)
            victim = dice.randrange(4)
            time.sleep(dice.random() * 0.05)  # the moment of the kill, not a synchronisation
            crew.signal(victim, signal.SIGKILL)
            start = time.monotonic()
            for outcome in crew.answers([rank for rank in range(4) if rank != victim]):
                assert outcome.error is not None
                assert outcome.error.kind == "PeerDiedError"
                assert f"rank {victim} (pid" in outcome.error.message
            # Four ranks that sum without a pause may wait long for a core; the group's deadline is later still.
            assert time.monotonic() - start < 5 * _SOON_S
