"""Ranks that live and wait for each other: what they have issued tells a lost message from another collective."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from phalanx.collectives.descriptor import Descriptor
from phalanx.collectives.remote_lockstep import NUM_REPORTED, RemoteLockstep
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import CollectiveMismatchError, DeadlineError, PhalanxError
from phalanx.testing.thread_exchange import ThreadExchange

TIMEOUT_S = 0.1


def descriptor(size: int) -> Descriptor:
    return Descriptor("all_reduce", "float32", (size,))


def verdicts(*sizes_of: list[int]) -> list[PhalanxError]:
    """What each rank says after the collectives that it has issued, if it waits in vain for the other in the last."""
    spec = GroupSpec("tp", "gloo", (0, 1), 1, timeout_s=TIMEOUT_S, join_timeout_s=TIMEOUT_S)

    def run(rank: int, exchange: ThreadExchange) -> PhalanxError:
        lockstep = RemoteLockstep(spec, rank, exchange)
        for size in sizes_of[rank]:
            lockstep.issue(descriptor(size))
        return lockstep.blame("nothing came", TIMEOUT_S, (1 - rank,))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2), ThreadExchange.make(2)))


@pytest.mark.parametrize("ahead", [[1, 1, 2], [1, 1, 1, 1], [1, 1, 7, 3, 7]])
def test_who_is_ahead_with_the_same_collectives_has_lost_a_message(ahead: list[int]) -> None:
    for rank, verdict in enumerate(verdicts(ahead, [1, 1])):
        assert isinstance(verdict, DeadlineError)
        assert f"from rank {1 - rank} " in str(verdict)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [1, 3]),
        ([1, 2, 3], [1, 3]),
        ([1, 2], []),
        ([1] * (NUM_REPORTED + 2), [1]),
    ],
    ids=["now", "one before", "one has issued none", "too far apart"],
)
def test_another_collective_under_the_same_number_is_named(one: list[int], other: list[int]) -> None:
    for verdict in verdicts(one, other):
        assert isinstance(verdict, CollectiveMismatchError)
        assert "rank 0 is in all_reduce" in str(verdict)
