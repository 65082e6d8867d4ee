"""Groups whose ranks are on hosts of their own: they meet at the hosts' addresses, and a cut link is a named error."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hosts import Direction, Network, why_no_hosts

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from collectives_crew import Crew
from collectives_tasks import work_for_ever

from phalanx.collectives.group import Group

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

_REPORTS_S = 1.5
NUM_ROWS = 8


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack, ("alpha", "beta"), [])


def crew_on(network: Network, size: int, timeout_s: float = 20.0, family: int = 0) -> Crew:
    """Ranks on alpha and beta in turn. `family`: 0 for IPv4, 1 for IPv6."""
    alpha, beta = network.hosts.values()
    hosts = [((alpha, beta)[rank % 2], (alpha, beta)[rank % 2].addresses[family]) for rank in range(size)]
    return Crew("spanning", size, timeout_s, hosts=hosts)


def every_operation(group: Group) -> tuple[float, list[float], float, float, list[float]]:
    group.barrier()
    mine = torch.full((400, 576), float(group.rank), dtype=torch.bfloat16)
    total = group.all_reduce(mine.clone())[0, 0].item()
    gathered = group.all_gather(mine[:1, :1], 0)[:, 0].tolist()
    part = group.reduce_scatter(mine.repeat(group.size, 1))[-1, -1].item()
    # One row to every rank before this one.
    received = group.all_to_all(
        mine[: group.rank],
        [int(rank < group.rank) for rank in range(group.size)],
        [int(rank > group.rank) for rank in range(group.size)],
    )
    return total, gathered, group.broadcast(mine.clone(), 1)[-1, -1].item(), part, received[:, 0].tolist()


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_operation(network: Network, size: int, family: int) -> None:
    ranks = [float(rank) for rank in range(size)]
    with crew_on(network, size, family=family) as crew:
        assert crew.run(every_operation) == [
            (sum(ranks), ranks, 1.0, sum(ranks), ranks[rank + 1 :]) for rank in range(size)
        ]


def test_a_killed_rank_is_named_at_once(network: Network) -> None:
    with crew_on(network, 3) as crew:
        for rank in range(3):
            crew.send(rank, work_for_ever, "all_reduce", NUM_ROWS)
        start = time.monotonic()
        crew.signal(1, signal.SIGKILL)
        for outcome in crew.answers([0, 2]):
            assert outcome.error is not None
            assert outcome.error.kind == "PeerDiedError", outcome.error
            assert "rank 1 (pid" in outcome.error.message
        assert time.monotonic() - start < _REPORTS_S


def test_a_link_that_goes_down_is_an_error_at_the_deadline(network: Network) -> None:
    with crew_on(network, 2, timeout_s=2.0) as crew:
        crew.send(0, work_for_ever, "all_reduce", NUM_ROWS)
        crew.send(1, work_for_ever, "all_reduce", NUM_ROWS)
        with network.cables["beta"].cut():
            start = time.monotonic()
            for rank, outcome in enumerate(crew.answers([0, 1])):
                assert outcome.error is not None
                assert outcome.error.kind == "DeadlineError", outcome.error
                assert "group tp, epoch 3" in outcome.error.message
                peer, address = 1 - rank, ("10.0.0.2", "10.0.0.1")[rank]
                assert f"from rank {peer} (pid" in outcome.error.message
                assert f"on {address}), which lives" in outcome.error.message, "they still hear of each other"
            assert time.monotonic() - start < 2.0 + _REPORTS_S


@pytest.mark.parametrize("lost", ["sent", "received"])
def test_one_direction_dropped_is_an_error_at_the_deadline(network: Network, lost: str) -> None:
    with crew_on(network, 2, timeout_s=2.0) as crew:
        crew.send(0, work_for_ever, "all_reduce", NUM_ROWS)
        crew.send(1, work_for_ever, "all_reduce", NUM_ROWS)
        with network.cables["alpha"].impaired(**{lost: Direction(loss=1.0)}):
            start = time.monotonic()
            for outcome in crew.answers([0, 1]):
                assert outcome.error is not None
                assert outcome.error.kind == "DeadlineError", outcome.error
            assert time.monotonic() - start < 2.0 + _REPORTS_S


def test_delay_and_loss_are_survived(network: Network) -> None:
    bad = Direction(delay_s=0.05, loss=0.05)
    with crew_on(network, 2) as crew, network.cables["alpha"].impaired(sent=bad, received=bad):
        expected = 1.0, [0.0, 1.0], 1.0, 1.0
        assert crew.run(every_operation) == [(*expected, [1.0]), (*expected, [])]


def test_hosts_that_do_not_reach_each_other_do_not_join(network: Network) -> None:
    with network.cables["beta"].cut(), crew_on(network, 2, timeout_s=2.0) as crew:
        for rank, outcome in crew.joining.items():
            assert outcome.error is not None
            assert outcome.error.kind == "DeadlineError", outcome.error
            assert "the joining of group tp, epoch 3" in outcome.error.message
            assert f"from rank {1 - rank} (pid" in outcome.error.message
            assert outcome.took_s < 2.0 + 2 * _REPORTS_S
