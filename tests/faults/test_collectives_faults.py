"""A rank that diverges, is late, is stopped, leaves or dies: every other rank gets an error that names it, soon.

Whatever carries the data: between ranks that share memory and between ranks that do not.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from collectives_crew import Crew
from collectives_tasks import (
    OURS,
    all_gather,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    close,
    last_broadcast_and_exit,
    last_sum_and_exit,
    reduce_scatter,
    send_rows,
    sleep,
    work_for_ever,
)

pytestmark = pytest.mark.slow

SOON_S = {"shm": 1.0, "gloo": 1.0, "spanning": 2.5}
"""Half a second of the last one is for the reports of peers."""
MISMATCH_S = {"shm": 20.0, "gloo": 20.0, "spanning": 1.0}
"""Time-outs. Ranks that share memory see at once who is in another collective, others at the deadline."""
WORLDS = [("shm", 3), ("gloo", 3), ("spanning", 2), ("spanning", 3)]
WORK = [("all_reduce", 2), ("all_reduce", 2000), ("reduce_scatter", 2000), ("all_to_all", 2000)]
"""Operations and numbers of rows. A small sum goes another way than a large one."""
MISCOUNTS = [(1, 2), (2, 1), (1000, 1001), (1001, 1000)]
"""Rows that one rank sends and another expects of it."""
MISCOUNTS_UNDER_WAY = [(0, 1), (0, 2), (1, 0), (1, 3), (1000, 1002)]
"""Between hosts the ranks compare their counts while the rows are under way already, if there are any."""
backends = pytest.mark.parametrize("backend", SOON_S)


@pytest.mark.parametrize(("backend", "size"), WORLDS)
@pytest.mark.parametrize(
    ("task", "text"),
    [
        ((barrier,), "barrier"),
        ((all_gather,), "all_gather float32 [2, 576] dim=1"),
        ((broadcast, 0), "broadcast float32 [2, 576] src=0"),
        ((reduce_scatter,), "reduce_scatter float32 [6, 576]"),
        ((all_to_all,), "all_to_all float32 [576]"),
        ((all_reduce, "bfloat16"), "all_reduce bfloat16 [2, 576]"),
        ((all_reduce, "int32"), "all_reduce int32 [2, 576]"),
        ((all_reduce, "float32", (1152,)), "all_reduce float32 [1152]"),
        ((all_reduce, "float32", (1000, 576)), "all_reduce float32 [1000, 576]"),
        ((all_reduce, "float32", (1, 576)), "all_reduce float32 [1, 576]"),
    ],
    ids=[
        "barrier",
        "all_gather",
        "broadcast",
        "reduce_scatter",
        "all_to_all",
        "smaller dtype",
        "dtype",
        "shape",
        "larger",
        "smaller",
    ],
)
def test_a_rank_in_another_collective(backend: str, size: int, task: tuple, text: str) -> None:
    odd = size - 1
    with Crew(backend, size, timeout_s=MISMATCH_S[backend]) as crew:
        crew.run(all_reduce)
        for rank, outcome in enumerate(crew.outcomes([*[(all_reduce,)] * odd, task])):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError", outcome.error
            message = outcome.error.message
            assert "at sequence 2 of group tp, epoch 3" in message
            assert f"rank {odd} is in {text}" in message
            if backend == "spanning":
                assert f"rank 0 is in {OURS} (sequence 2)" in message
                assert f"rank {odd} is in {text} (sequence 2)" in message
                assert outcome.took_s < MISMATCH_S[backend] + SOON_S[backend]
            else:
                assert any(f"rank {other} is in {OURS}" in message for other in range(odd))
                assert f"rank {rank} is in" in message
                assert outcome.took_s < SOON_S[backend]
        for again in crew.outcomes([(barrier,)] * size):
            assert again.error is not None, "a group that has failed must not work again"
            assert again.error.kind == "CollectiveMismatchError"


@pytest.mark.parametrize(
    ("backend", "num_sent", "num_expected"),
    [
        *((backend, *counts) for backend in SOON_S for counts in MISCOUNTS),
        *(("spanning", *counts) for counts in MISCOUNTS_UNDER_WAY),
    ],
)
def test_ranks_that_count_their_rows_differently_are_both_named(backend: str, num_sent: int, num_expected: int) -> None:
    num_rows = min(num_sent, num_expected)
    agreed = [[num_rows] * 3] * 3
    counts = [[num_rows, num_sent, num_rows], *agreed[1:]]
    expected = [agreed[0], [num_expected, num_rows, num_rows], agreed[2]]
    exactly = f"in all_to_all float32 [576] rank 0 sends {num_sent} rows to rank 1, which expects {num_expected}"
    with Crew(backend, 3, timeout_s=5.0) as crew:
        crew.run(send_rows, agreed, agreed)
        outcomes = crew.outcomes([(send_rows, counts, expected)] * 3)
        if backend == "spanning" and outcomes[2].error is None:  # what was for it was there
            outcomes[2] = crew.outcomes([(barrier,)] * 3)[2]
        for outcome in outcomes:
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError", outcome.error
            if backend == "spanning":
                assert exactly in outcome.error.message
            else:
                assert outcome.error.message == f"at sequence 2 of group tp, epoch 3: {exactly}"
            assert outcome.took_s < SOON_S[backend], "nobody waits for its deadline"
        for again in crew.outcomes([(barrier,)] * 3):
            assert again.error is not None, "a group that has failed must not work again"


@backends
def test_ranks_that_do_not_join_are_named(backend: str) -> None:
    with Crew(backend, 4, timeout_s=0.5, absent=[1, 3]) as crew:
        for outcome in crew.joining.values():
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert outcome.error.message.endswith(" s for the joining of group tp, epoch 3 from rank 1, rank 3")
            if backend == "spanning":
                assert outcome.error.message.startswith("waited 0.5 s for")
            assert outcome.took_s < 3.0


@backends
def test_a_rank_that_does_not_come_is_named(backend: str) -> None:
    with Crew(backend, 3, timeout_s=0.7) as crew:
        crew.send(0, all_reduce)
        crew.send(2, all_reduce)
        outcomes = crew.answers([0, 2])
        for outcome in outcomes:
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError"
            assert OURS in outcome.error.message
            assert "(sequence 1 of group tp, epoch 3)" in outcome.error.message
            assert "from rank 1 (pid" in outcome.error.message
            assert "rank 0 (pid" not in outcome.error.message
            assert "rank 2 (pid" not in outcome.error.message
            assert outcome.took_s < 3.0
        # Who began to wait first waits to the end; the other may hear from it that it gave up.
        assert max(outcome.took_s for outcome in outcomes) > 0.6
        if backend == "spanning":
            assert min(outcome.took_s for outcome in outcomes) > 0.6
            crew.send(1, all_reduce)
            (late,) = crew.answers([1])
            assert late.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize(("operation", "num_rows"), WORK)
@backends
def test_a_stopped_rank_is_named(backend: str, operation: str, num_rows: int) -> None:
    with Crew(backend, 3, timeout_s=1.0) as crew:
        for rank in range(3):
            crew.send(rank, work_for_ever, operation, num_rows)
        crew.signal(1, signal.SIGSTOP)
        for rank, outcome in zip((0, 2), crew.answers([0, 2]), strict=True):
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError", outcome.error
            assert f"{operation} float32" in outcome.error.message
            if rank == 0 or backend == "spanning":
                assert "from rank 1 (pid" in outcome.error.message
        crew.signal(1, signal.SIGCONT)
        (resumed,) = crew.answers([1])
        assert resumed.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize(("operation", "num_rows"), WORK)
@pytest.mark.parametrize(("backend", "size"), [("shm", 4), ("gloo", 4), ("spanning", 2), ("spanning", 4)])
def test_a_killed_rank_is_named_at_once(backend: str, size: int, operation: str, num_rows: int) -> None:
    victim = size - 1
    with Crew(backend, size) as crew:
        for rank in range(size):
            crew.send(rank, work_for_ever, operation, num_rows)
        start = time.monotonic()
        crew.signal(victim, signal.SIGKILL)
        for rank, outcome in enumerate(crew.answers(range(victim))):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert f"rank {victim} (pid" in outcome.error.message
            assert f"{operation} float32" in outcome.error.message
            if backend == "spanning":
                assert f"rank {rank} needs it for" in outcome.error.message
        assert time.monotonic() - start < SOON_S[backend]


@backends
def test_a_rank_that_is_busy_when_another_dies_does_not_pass_for_dead(backend: str) -> None:
    with Crew(backend, 3) as crew:
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


@backends
def test_a_rank_that_leaves_is_named(backend: str) -> None:
    with Crew(backend, 3) as crew:
        crew.run(barrier)
        outcomes = crew.outcomes([(all_reduce,), (all_reduce,), (close,)])
        assert outcomes[2].error is None
        for rank, outcome in enumerate(outcomes[:2]):
            assert outcome.error is not None
            assert outcome.error.kind == "CollectiveMismatchError"
            assert "rank 2 has left group tp, epoch 3" in outcome.error.message
            assert f"rank {rank} is in {OURS}" in outcome.error.message
            assert outcome.took_s < SOON_S[backend]


@backends
def test_a_rank_may_exit_right_after_its_last_sum(backend: str) -> None:
    for _ in range(3):
        with Crew(backend, 3) as crew:
            crew.send(0, all_reduce)
            crew.send(1, all_reduce)
            crew.send(2, last_sum_and_exit)
            assert [outcome.value for outcome in crew.answers([0, 1])] == [3.0 * 1152] * 2


@backends
def test_the_source_of_a_broadcast_may_exit_right_after_it(backend: str) -> None:
    for _ in range(3):
        with Crew(backend, 3) as crew:
            crew.send(2, last_broadcast_and_exit, 2)
            crew.send(0, broadcast, 2)
            crew.send(1, sleep, 0.2)
            crew.send(1, broadcast, 2)
            first, _, second = crew.answers([0, 1, 1])
            assert [first.value, second.value] == [2.0 * 1152] * 2
