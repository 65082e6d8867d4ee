"""Ranks that share no memory: one that diverges, is late, stopped or cut off, leaves or dies is named by the others."""

from __future__ import annotations

import os
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

_SOON_S = 2.5
"""Half a second of it is for the reports of peers."""
_OURS = "all_reduce float32 [2, 576]"


def all_reduce(group: Group, dtype: str = "float32", shape: tuple[int, ...] = (2, 576)) -> float:
    return group.all_reduce(torch.ones(shape).to(getattr(torch, dtype))).sum().item()


def all_gather(group: Group, dim: int = -1) -> None:
    group.all_gather(torch.ones(2, 576), dim)


def broadcast(group: Group, src: int, rows: int = 2) -> float:
    return group.broadcast(torch.full((rows, 576), float(group.rank)), src).sum().item()


def barrier(group: Group) -> None:
    group.barrier()


def close(group: Group) -> None:
    group.close()


def reduce_scatter(group: Group) -> None:
    group.reduce_scatter(torch.ones(6, 576))


def all_to_all(group: Group) -> None:
    """Each rank sends one row to each."""
    each = [1] * group.size
    group.all_to_all(torch.ones(group.size, 576), each, each)


def sleep(_: Group, seconds: float = 3600.0) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ((barrier,), "barrier"),
        ((all_gather,), "all_gather float32 [2, 576] dim=1"),
        ((broadcast, 0), "broadcast float32 [2, 576] src=0"),
        ((reduce_scatter,), "reduce_scatter float32 [6, 576]"),
        ((all_to_all,), "all_to_all float32 [576]"),
        ((all_reduce, "int32"), "all_reduce int32 [2, 576]"),
        ((all_reduce, "float32", (1152,)), "all_reduce float32 [1152]"),
        ((all_reduce, "float32", (1000, 576)), "all_reduce float32 [1000, 576]"),
        ((all_reduce, "float32", (1, 576)), "all_reduce float32 [1, 576]"),
    ],
    ids=["barrier", "all_gather", "broadcast", "reduce_scatter", "all_to_all", "dtype", "shape", "larger", "smaller"],
)
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_in_another_collective(size: int, task: tuple, text: str) -> None:
    odd = size - 1
    with Crew("spanning", size, timeout_s=1.0) as crew:
        crew.run(all_reduce)
        for outcome in crew.outcomes([*[(all_reduce,)] * odd, task]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError", outcome.error
            message = outcome.error.message
            assert "at sequence 2 of group tp, epoch 3" in message
            assert f"rank 0 is in {_OURS} (sequence 2)" in message
            assert f"rank {odd} is in {text} (sequence 2)" in message
            assert outcome.took_s < 1.0 + _SOON_S
        for again in crew.outcomes([(barrier,)] * size):
            assert again.error is not None, "a group that has failed must not work again"


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
            assert f"rank 0 is in {_OURS} (sequence 2); rank 1 is in {_OURS} (sequence 1)" in outcome.error.message


@pytest.mark.parametrize("num_rows", [0, 1, 1000], ids=["none", "few", "many"])
@pytest.mark.parametrize("difference", [2, 1, -1], ids=["much too few", "too few", "too many"])
def test_ranks_that_count_their_rows_differently_are_both_named(difference: int, num_rows: int) -> None:
    num_sent, num_expected = (num_rows, num_rows + difference) if difference > 0 else (num_rows + 1, num_rows)
    counts = [[num_rows, num_sent, num_rows], [num_rows] * 3, [num_rows] * 3]
    expected = [[num_rows] * 3, [num_expected, num_rows, num_rows], [num_rows] * 3]
    with Crew("spanning", 3, timeout_s=5.0) as crew:
        crew.run(barrier)
        outcomes = crew.outcomes([(send_rows, counts, expected)] * 3)
        if outcomes[2].error is None:  # what was for it was there
            outcomes[2] = crew.outcomes([(barrier,)] * 3)[2]
        for outcome in outcomes:
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError", outcome.error
            exactly = (
                f"in all_to_all float32 [576] rank 0 sends {num_sent} rows to rank 1, which expects {num_expected}"
            )
            assert exactly in outcome.error.message
            assert outcome.took_s < _SOON_S, "nobody waits for its deadline"
        for again in crew.outcomes([(barrier,)] * 3):
            assert again.error is not None, "a group that has failed must not work again"


def test_ranks_that_do_not_join_are_named() -> None:
    with Crew("spanning", 4, timeout_s=0.5, absent=[1, 3]) as crew:
        for outcome in crew.joining.values():
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert outcome.error.message == "waited 0.5 s for the joining of group tp, epoch 3 from rank 1, rank 3"
            assert outcome.took_s < 0.5 + _SOON_S


def test_a_rank_that_does_not_come_is_named() -> None:
    with Crew("spanning", 3, timeout_s=0.7) as crew:
        crew.send(0, all_reduce)
        crew.send(2, all_reduce)
        for outcome in crew.answers([0, 2]):
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert f"for {_OURS} (sequence 1 of group tp, epoch 3)" in outcome.error.message
            assert "from rank 1 (pid" in outcome.error.message
            assert "rank 0 (pid" not in outcome.error.message
            assert "rank 2 (pid" not in outcome.error.message
            assert 0.6 < outcome.took_s < 0.7 + _SOON_S
        crew.send(1, all_reduce)
        (late,) = crew.answers([1])
        assert late.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize("operation", SHARING)
@pytest.mark.parametrize("num_rows", [2, 2000], ids=["small", "large"])
def test_a_stopped_rank_is_named(num_rows: int, operation: str) -> None:
    with Crew("spanning", 3, timeout_s=1.0) as crew:
        for rank in range(3):
            crew.send(rank, work_for_ever, operation, num_rows)
        crew.signal(1, signal.SIGSTOP)
        for outcome in crew.answers([0, 2]):
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError", outcome.error
            assert f"{operation} float32" in outcome.error.message
            assert "from rank 1 (pid" in outcome.error.message
        crew.signal(1, signal.SIGCONT)
        (resumed,) = crew.answers([1])
        assert resumed.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize("operation", SHARING)
@pytest.mark.parametrize("num_rows", [2, 2000], ids=["small", "large"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_killed_rank_is_named_at_once(size: int, num_rows: int, operation: str) -> None:
    victim = size - 1
    with Crew("spanning", size) as crew:
        for rank in range(size):
            crew.send(rank, work_for_ever, operation, num_rows)
        start = time.monotonic()
        crew.signal(victim, signal.SIGKILL)
        for rank, outcome in enumerate(crew.answers(range(victim))):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert f"rank {victim} (pid" in outcome.error.message
            assert f"rank {rank} needs it for {operation} float32" in outcome.error.message
        assert time.monotonic() - start < _SOON_S


def test_a_rank_that_is_busy_when_another_dies_does_not_pass_for_dead() -> None:
    with Crew("spanning", 3) as crew:
        crew.send(0, all_reduce)
        crew.send(1, sleep, 1.0)
        crew.send(1, all_reduce)
        crew.signal(2, signal.SIGKILL)
        _, busy = crew.answers([1, 1])
        (waiting,) = crew.answers([0])
        for outcome in (busy, waiting):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert "rank 2 (pid" in outcome.error.message


def test_a_rank_that_leaves_is_named() -> None:
    with Crew("spanning", 3) as crew:
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


def test_a_rank_may_exit_right_after_its_last_sum() -> None:
    for _ in range(3):
        with Crew("spanning", 3) as crew:
            crew.send(0, all_reduce)
            crew.send(1, all_reduce)
            crew.send(2, last_sum_and_exit)
            assert [outcome.value for outcome in crew.answers([0, 1])] == [3.0 * 1152] * 2


def last_broadcast_and_exit(group: Group) -> None:
    broadcast(group, 2)
    os._exit(0)


def test_the_source_of_a_broadcast_may_exit_right_after_it() -> None:
    for _ in range(3):
        with Crew("spanning", 3) as crew:
            crew.send(2, last_broadcast_and_exit)
            crew.send(0, broadcast, 2)
            crew.send(1, sleep, 0.2)
            crew.send(1, broadcast, 2)
            first, _, second = crew.answers([0, 1, 1])
            assert [first.value, second.value] == [2.0 * 1152] * 2


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


def sum_on_gpu_and_meet(group: Group) -> None:
    group.all_reduce(torch.ones(1000, device="cuda"))
    group.barrier()


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
