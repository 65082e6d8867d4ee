"""What is seen only between ranks of one host, which share memory: who is where, at once."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from collectives_crew import Crew
from collectives_tasks import (
    OURS,
    SHARING,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    close,
    sleep,
    sum_on_gpu_and_meet,
    work_for_ever,
)

from phalanx.collectives.group import Group

pytestmark = pytest.mark.slow

BACKENDS = ["shm", "gloo"]
SOON_S = 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ours", "our_text", "theirs", "their_text"),
    [
        ((all_gather, 0), "all_gather float32 [2, 576] dim=0", (all_gather, 1), "all_gather float32 [2, 576] dim=1"),
        ((broadcast, 0), "broadcast float32 [2, 576] src=0", (broadcast, 1), "broadcast float32 [2, 576] src=1"),
        ((all_to_all,), "all_to_all float32 [576]", (all_to_all, "bfloat16"), "all_to_all bfloat16 [576]"),
        ((all_to_all,), "all_to_all float32 [576]", (all_to_all, "float32", 64), "all_to_all float32 [64]"),
    ],
    ids=["dim", "src", "dtype of rows", "shape of rows"],
)
def test_the_same_operation_in_another_way(
    backend: str, ours: tuple, our_text: str, theirs: tuple, their_text: str
) -> None:
    with Crew(backend, 2) as crew:
        for outcome in crew.outcomes([ours, theirs]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert f"rank 0 is in {our_text}; rank 1 is in {their_text}" in outcome.error.message


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mismatch_is_told_to_ranks_that_wait_for_a_third(backend: str) -> None:
    with Crew(backend, 3) as crew:
        crew.send(0, all_reduce)
        crew.send(2, barrier)
        for outcome in crew.answers([0, 2]):  # rank 1 has not come at all
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert outcome.took_s < SOON_S
        crew.send(1, all_reduce)
        (late,) = crew.answers([1])
        assert late.error is not None
        assert late.error.kind == "CollectiveMismatchError"
        expected = f"rank 0 is in {OURS}; rank 1 is in {OURS}; rank 2 is in barrier"
        assert late.error.message.endswith(expected)


@pytest.mark.parametrize("backend", BACKENDS)
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
        assert outcome.took_s < SOON_S


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
        assert closing.took_s < 5 * SOON_S, "leaving a group must not wait for its dead"


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
def test_a_kill_at_any_moment_is_noticed_by_all(operation: str, num_rows: int) -> None:
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
            assert time.monotonic() - start < 5 * SOON_S
