"""Links of a pipeline: the source of a broadcast goes on before its peer has come, and no data is lost or mixed up."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.shared_memory import SharedMemoryGroup
from phalanx.errors import CollectiveMismatchError, DeadlineError

Program = Callable[[SharedMemoryGroup], object]


def run(source: Program, peer: Program, timeout_s: float = 20.0, *, runs_ahead: bool = True) -> list[Future[object]]:
    """What becomes of the two programs, which run as global ranks 4 and 7."""
    with open_rendezvous(
        "pp0-1@0", "shm", (4, 7), epoch=0, timeout_s=timeout_s, join_timeout_s=20.0, runs_ahead=runs_ahead
    ) as rendezvous:

        def body(rank: int, program: Program) -> object:
            group = SharedMemoryGroup(rendezvous.spec, rank)
            try:
                return program(group)
            finally:
                group.close()

        with ThreadPoolExecutor(2) as threads:
            return [threads.submit(body, 4, source), threads.submit(body, 7, peer)]


def values(futures: list[Future[object]]) -> list[object]:
    return [future.result() for future in futures]


def test_the_source_does_not_wait_for_its_peer() -> None:
    went_on = threading.Event()

    def source(group: SharedMemoryGroup) -> None:
        x = torch.arange(5.0)
        group.broadcast(x, 0)
        x.zero_()  # what was given is given
        went_on.set()

    def peer(group: SharedMemoryGroup) -> list[float]:
        assert went_on.wait(10.0)
        return list(group.broadcast(torch.empty(5), 0).tolist())

    assert values(run(source, peer)) == [None, [0.0, 1.0, 2.0, 3.0, 4.0]]


def test_without_running_ahead_it_waits() -> None:
    def source(group: SharedMemoryGroup) -> float:
        began = time.monotonic()
        group.broadcast(torch.ones(1), 0)
        return time.monotonic() - began

    def peer(group: SharedMemoryGroup) -> None:
        time.sleep(0.2)
        group.broadcast(torch.empty(1), 0)

    waited_s, _ = values(run(source, peer, runs_ahead=False))
    assert waited_s > 0.15


def test_it_is_ahead_by_one_and_then_waits_for_who_does_not_come() -> None:
    left = threading.Event()

    def source(group: SharedMemoryGroup) -> str:
        group.broadcast(torch.ones(3), 0)
        with pytest.raises(DeadlineError) as caught:
            group.broadcast(torch.ones(3), 0)
        left.set()
        return str(caught.value)

    def peer(group: SharedMemoryGroup) -> None:
        assert left.wait(10.0)

    message, _ = values(run(source, peer, timeout_s=0.2))
    assert "broadcast float32 [3] (sequence 1 of group pp0-1@0" in str(message)
    assert "rank 7" in str(message)


def test_what_was_given_is_there_when_the_source_has_left() -> None:
    has_left = threading.Event()

    def source(group: SharedMemoryGroup) -> None:
        group.broadcast(torch.full((4,), 6), 0)
        group.close()
        has_left.set()

    def peer(group: SharedMemoryGroup) -> list[int]:
        assert has_left.wait(10.0)
        received = group.broadcast(torch.empty(4, dtype=torch.int64), 0)
        with pytest.raises(CollectiveMismatchError, match="rank 4 has left"):
            group.broadcast(torch.empty(4), 0)
        return list(received.tolist())

    assert values(run(source, peer)) == [None, [6, 6, 6, 6]]


def test_a_mismatch_shows_at_once_at_the_peer_and_in_the_next_operation_at_the_source() -> None:
    seen = threading.Event()

    def source(group: SharedMemoryGroup) -> str:
        group.broadcast(torch.ones(2), 0)
        assert seen.wait(10.0)
        with pytest.raises(CollectiveMismatchError) as caught:
            group.broadcast(torch.ones(2), 0)
        return str(caught.value)

    def peer(group: SharedMemoryGroup) -> str:
        with pytest.raises(CollectiveMismatchError) as caught:
            group.broadcast(torch.empty(3), 0)
        seen.set()
        return str(caught.value)

    for message in values(run(source, peer)):
        assert re.search(r"rank 4 is in broadcast float32 \[2\].*; rank 7 is in broadcast float32 \[3\]", str(message))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_mixed_up_at_any_pace(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice([1, 100, 5_000, 200_000, 9_000_000]) for _ in range(25)]  # the last is larger than a slot
    others = ["all_reduce", "reduce_scatter", "all_to_all", "back"]
    kinds = [rng.choice(["broadcast"] * 8 + others) for _ in sizes]

    def program(group: SharedMemoryGroup) -> list[tuple[float, float]]:
        pace, found = random.Random(seed + group.rank), []
        for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
            time.sleep(pace.choice([0.0, 0.0, 0.002]))
            x = torch.full((size,), float(10 * i + group.rank))
            if kind == "all_reduce":
                group.all_reduce(x)
            elif kind == "all_to_all":
                counts = [size if rank != group.rank else 0 for rank in range(2)]
                x = group.all_to_all(x, counts, counts)
            elif kind == "reduce_scatter":
                x = group.reduce_scatter(x.repeat(2))
            else:
                group.broadcast(x, 0 if kind == "broadcast" else 1)
            found.append((x[0].item(), x[-1].item()))
            x.fill_(-1.0)
        return found

    def expected(rank: int) -> list[tuple[float, float]]:
        of_kind = {"broadcast": (10, 0), "back": (10, 1), "all_to_all": (10, 1 - rank)}
        factors = [of_kind.get(kind, (20, 1)) for kind in kinds]  # or a sum
        return [(float(factor * i + rest),) * 2 for i, (factor, rest) in enumerate(factors)]

    assert values(run(program, program)) == [expected(0), expected(1)]
