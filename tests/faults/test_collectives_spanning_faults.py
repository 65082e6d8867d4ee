"""Ranks that share no memory: what one of them finds out alone, and how far it may be ahead."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from collectives_crew import Crew
from collectives_tasks import OURS, all_reduce, broadcast, close, sum_on_gpu_and_meet

from phalanx.collectives.group import Group

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ours", "theirs"), [(2, 1), (1, 2)], ids=["too little", "too much"])
def test_a_broadcast_of_another_size_is_never_taken_for_ours(ours: int, theirs: int) -> None:
    with Crew("spanning", 2, timeout_s=1.0, runs_ahead=True) as crew:
        source, receiver = crew.outcomes([(broadcast, 0, theirs), (broadcast, 0, ours)])
        assert source.error is None, "it runs ahead"
        assert receiver.error is not None
        assert receiver.error.kind == "DeadlineError", "the source is in no collective any more"
        assert "from rank 0 (pid" in receiver.error.message
        (next_one,) = crew.outcomes([(all_reduce,)])
        assert next_one.error is not None


def test_a_rank_that_skips_a_collective() -> None:
    with Crew("spanning", 2, timeout_s=1.0, runs_ahead=True) as crew:
        crew.send(0, broadcast, 0)
        crew.send(0, all_reduce)
        crew.send(1, all_reduce)
        _, first = crew.answers([0, 0])
        (second,) = crew.answers([1])
        for outcome in (first, second):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert f"rank 0 is in {OURS} (sequence 2); rank 1 is in {OURS} (sequence 1)" in outcome.error.message


def broadcast_often(group: Group, times: int, pause_s: float) -> list[float]:
    """The values that arrived, and how long it took."""
    values, x = [], torch.empty(300_000)
    start = time.monotonic()
    for i in range(times):
        time.sleep(pause_s)
        values.append(group.broadcast(x.fill_(i if group.rank == 0 else -1.0), 0).mean().item())
    return [*values, time.monotonic() - start]


def test_the_source_of_broadcasts_runs_ahead_and_may_reuse_its_memory() -> None:
    with Crew("spanning", 2, runs_ahead=True) as crew:
        source, receiver = crew.outcomes([(broadcast_often, 4, 0.0), (broadcast_often, 4, 0.25)])
        assert source.error is None
        assert receiver.error is None
        assert receiver.value[:-1] == [0.0, 1.0, 2.0, 3.0]
        assert source.value[-1] < 0.5, "it need not wait for those that come later"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_on_gpus_a_barrier_names_the_rank_that_does_not_come() -> None:
    with Crew("spanning-nccl", 2, timeout_s=10.0, absent=[1]) as crew:
        (alone,) = crew.joining.values()
        assert alone.error is not None
        assert alone.error.message == "waited 10 s for the joining of group tp, epoch 3 from rank 1"
    with Crew("spanning-nccl", 2, timeout_s=10.0) as crew:
        crew.send(0, sum_on_gpu_and_meet)
        (late,) = crew.answers([0])
        assert late.error is not None
        assert late.error.kind == "DeadlineError"
        assert "for barrier (sequence 2 of group tp, epoch 3)" in late.error.message
        assert "from rank 1 (pid" in late.error.message
        crew.send(0, close)
        (closing,) = crew.answers([0])
        assert closing.error is None
        assert closing.took_s < 5.0, "leaving a group must not wait for others"
