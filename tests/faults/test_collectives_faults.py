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
    barrier,
    broadcast,
    close,
    last_broadcast_and_exit,
    last_sum_and_exit,
    sleep,
    sum_for_ever,
)

pytestmark = pytest.mark.slow

SOON_S = {"shm": 1.0, "gloo": 1.0, "spanning": 2.5}
"""Half a second of the last one is for the reports of peers."""
MISMATCH_S = {"shm": 20.0, "gloo": 20.0, "spanning": 1.0}
"""Time-outs. Ranks that share memory see at once who is in another collective, others at the deadline."""
WORLDS = [("shm", 3), ("gloo", 3), ("spanning", 2), ("spanning", 3)]
backends = pytest.mark.parametrize("backend", SOON_S)


@pytest.mark.parametrize(("backend", "size"), WORLDS)
@pytest.mark.parametrize(
    ("task", "text"),
    [
        ((barrier,), "barrier"),
        ((all_gather,), "all_gather float32 [2, 576] dim=1"),
        ((broadcast, 0), "broadcast float32 [2, 576] src=0"),
        ((all_reduce, "bfloat16"), "all_reduce bfloat16 [2, 576]"),
        ((all_reduce, "int32"), "all_reduce int32 [2, 576]"),
        ((all_reduce, "float32", (1152,)), "all_reduce float32 [1152]"),
        ((all_reduce, "float32", (1000, 576)), "all_reduce float32 [1000, 576]"),
        ((all_reduce, "float32", (1, 576)), "all_reduce float32 [1, 576]"),
    ],
    ids=["barrier", "all_gather", "broadcast", "smaller dtype", "dtype", "shape", "larger", "smaller"],
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


@pytest.mark.parametrize("shape", [(2, 576), (2000, 576)], ids=["small", "large"])
@backends
def test_a_stopped_rank_is_named(backend: str, shape: tuple[int, ...]) -> None:
    with Crew(backend, 3, timeout_s=1.0) as crew:
        for rank in range(3):
            crew.send(rank, sum_for_ever, shape)
        crew.signal(1, signal.SIGSTOP)
        for rank, outcome in zip((0, 2), crew.answers([0, 2]), strict=True):
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError", outcome.error
            assert "all_reduce float32" in outcome.error.message
            if rank == 0 or backend == "spanning":
                assert "from rank 1 (pid" in outcome.error.message
        crew.signal(1, signal.SIGCONT)
        (resumed,) = crew.answers([1])
        assert resumed.error is not None, "the others have given up; it must not go on alone"


@pytest.mark.parametrize("shape", [(2, 576), (2000, 576)], ids=["small", "large"])
@pytest.mark.parametrize(("backend", "size"), [("shm", 4), ("gloo", 4), ("spanning", 2), ("spanning", 4)])
def test_a_killed_rank_is_named_at_once(backend: str, size: int, shape: tuple[int, ...]) -> None:
    victim = size - 1
    with Crew(backend, size) as crew:
        for rank in range(size):
            crew.send(rank, sum_for_ever, shape)
        start = time.monotonic()
        crew.signal(victim, signal.SIGKILL)
        for rank, outcome in enumerate(crew.answers(range(victim))):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert f"rank {victim} (pid" in outcome.error.message
            assert "all_reduce float32" in outcome.error.message
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
