"""Groups that span hosts with threads for ranks: quick, where tests/contract and tests/faults have processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest
import torch

from phalanx.collectives.exchange_store import ExchangeStore
from phalanx.collectives.group import Group
from phalanx.collectives.join import join
from phalanx.collectives.nccl_bootstrap import connect_over
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import CollectiveMismatchError, DeadlineError, PeerDiedError
from phalanx.testing.thread_exchange import ThreadExchange

_CPU = torch.device("cpu")


def _spec(*ranks: int, timeout_s: float = 20.0) -> GroupSpec:
    return GroupSpec("pp0-1@2", "gloo", ranks, epoch=7, timeout_s=timeout_s, join_timeout_s=timeout_s)


def _run(spec: GroupSpec, rank_program: Callable[[Group], object]) -> list[Future[object]]:
    """What becomes of `rank_program(group)` on each rank."""

    def run(rank: int, exchange: ThreadExchange) -> object:
        group = join(spec, rank, _CPU, exchange)
        try:
            return rank_program(group)
        finally:
            group.close()

    with ThreadPoolExecutor(spec.size) as threads:
        exchanges = ThreadExchange.make(spec.size)
        return [threads.submit(run, *of_rank) for of_rank in zip(spec.ranks, exchanges, strict=True)]


def test_a_group_without_a_rendezvous_spans_hosts() -> None:
    assert _spec(0, 1).spans_hosts
    assert not GroupSpec("tp", "single", (0,), 0, 1.0, 1.0).spans_hosts
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(_spec(3, 5)), type=GroupSpec) == _spec(3, 5)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("num_elements", [0, 7, 40_000, 150_000])
def test_sums_are_taken_in_rank_order_and_rounded_once(size: int, num_elements: int) -> None:
    addends = [
        torch.randn(num_elements, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
        for rank in range(size)
    ]
    expected = addends[0].float()
    for addend in addends[1:]:
        expected = expected + addend.float()
    for future in _run(_spec(*range(size)), lambda group: group.all_reduce(addends[group.rank].clone())):
        assert torch.equal(future.result(), expected.to(torch.bfloat16))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_reduce_scatter_is_a_part_of_the_sum_to_the_last_bit(size: int, rows: int) -> None:
    def program(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(group.rank)
        x = (torch.randn(size * rows, 501, generator=generator) * 100).to(torch.bfloat16)
        return group.reduce_scatter(x), group.all_reduce(x)

    for rank, future in enumerate(_run(_spec(*range(size)), program)):
        part, whole = future.result()
        assert part.shape == (rows, 501)
        assert torch.equal(part, whole[rank * rows : (rank + 1) * rows])


def test_ranks_that_count_their_rows_differently_are_told_how() -> None:
    counts, expected = [[0, 3, 1], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [4, 0, 0], [1, 0, 0]]

    def program(group: Group) -> None:
        group.barrier()
        group.all_to_all(torch.ones(sum(counts[group.rank]), 8), counts[group.rank], expected[group.rank])
        group.barrier()

    exactly = "in all_to_all float32 [8] rank 4 sends 3 rows to rank 6, which expects 4"
    for future in _run(_spec(4, 6, 9), program):
        with pytest.raises(CollectiveMismatchError) as caught:
            future.result()
        assert exactly in str(caught.value)


def test_gather_and_broadcast() -> None:
    def program(group: Group) -> tuple[list[list[int]], list[int]]:
        gathered = group.all_gather(torch.full((2, 1), group.rank))
        return gathered.tolist(), group.broadcast(torch.tensor([group.rank, 5]), 2).tolist()

    for future in _run(_spec(4, 6, 9), program):
        assert future.result() == ([[0, 1, 2], [0, 1, 2]], [2, 5])


def test_ranks_in_different_collectives_are_told_what_each_is_in() -> None:
    def program(group: Group) -> None:
        group.barrier()
        group.all_reduce(torch.ones(2, 3 + group.rank))

    for future in _run(_spec(4, 6, timeout_s=0.5), program):
        with pytest.raises(CollectiveMismatchError, match="at sequence 2 of group pp0-1@2, epoch 7") as caught:
            future.result()
        assert str(caught.value).endswith(
            "rank 4 is in all_reduce float32 [2, 3] (sequence 2); rank 6 is in all_reduce float32 [2, 4] (sequence 2)"
        )


def test_a_rank_that_does_not_join_is_named() -> None:
    exchange, _ = ThreadExchange.make(2)
    awaited = r"waited 0\.1 s for the joining of group pp0-1@2, epoch 7 from rank 6$"
    with pytest.raises(DeadlineError, match=awaited):
        join(_spec(4, 6, timeout_s=0.1), 4, _CPU, exchange)


def test_a_rank_that_does_not_come_is_named() -> None:
    def program(group: Group) -> None:
        group.barrier()
        if group.rank == 0:
            group.barrier()

    came, _ = _run(_spec(4, 6, timeout_s=0.3), program)
    # The other one has left by then, which it says.
    with pytest.raises(CollectiveMismatchError, match=r"rank 6 has left .*, and rank 4 is in barrier \(sequence 2"):
        came.result()


def test_a_connection_that_breaks_without_a_word_is_a_death() -> None:
    def program(group: Group) -> None:
        group.barrier()
        if group.rank == 1:
            group._backend = None  # its connections close, and nobody reports
        else:
            group.all_reduce(torch.ones(3))
        group._lockstep._failure = group._lockstep._failure or DeadlineError("nothing", "nobody", 0.0)

    bereft, _ = _run(_spec(4, 6), program)
    with pytest.raises(PeerDiedError, match=r"rank 6 \(pid \d+\) died: .*rank 4 needs it for all_reduce float32 \[3\]"):
        bereft.result()


def test_connections_close_at_once_whoever_keeps_the_error() -> None:
    def program(group: Group) -> None:
        group.barrier()
        group.all_reduce(torch.ones(3 + group.rank))

    _run(_spec(4, 6), Group.barrier)  # opens what the process keeps
    before = set(os.listdir("/proc/self/fd"))
    outcomes = _run(_spec(4, 6, timeout_s=0.3), program)
    assert all(outcome.exception() is not None for outcome in outcomes)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_closed_group_says_so() -> None:
    def program(group: Group) -> None:
        group.barrier()
        group.close()
        group.all_reduce(torch.ones(3))

    for future in _run(_spec(0, 1), program):
        with pytest.raises(CollectiveMismatchError, match="group pp0-1@2, epoch 7 is closed"):
            future.result()


def test_the_store_waits_no_longer_than_it_is_told() -> None:
    ours, theirs = ThreadExchange.make(2)
    store = ExchangeStore(ours, "tp", 0.1)
    ExchangeStore(theirs, "tp", 0.1).set("a", b"\x00\xff")
    assert store.get("a") == b"\x00\xff"
    with pytest.raises(TimeoutError, match=r"b was not set within 0\.1 s"):
        store.wait(["a", "b"])


def test_what_the_first_rank_stores_reaches_the_others_before_it_goes_on() -> None:
    """NCCL's first rank sets its unique id and then waits until the others, who need it, have connected."""
    done: Future[None] = Future()

    def first(store: object) -> str:
        store.set("0", "the id")
        done.result(10)
        return "first"

    def second(store: object) -> bytes:
        done.set_result(None)
        return store.get("0")

    exchanges = ThreadExchange.make(2)
    with ThreadPoolExecutor(2) as threads:
        futures = [
            threads.submit(connect_over, exchange, "tp", connect is first, 10.0, connect=connect, check=lambda: None)
            for exchange, connect in zip(exchanges, (first, second), strict=True)
        ]
    assert [future.result() for future in futures] == ["first", b"the id"]


def test_a_connection_that_is_never_made_ends_at_its_deadline() -> None:
    never: Future[None] = Future()
    exchange, _ = ThreadExchange.make(2)
    with pytest.raises(TimeoutError, match=r"not connected within 0\.1 s"):
        connect_over(exchange, "tp", True, 0.1, connect=lambda store: never.result(), check=lambda: None)
    with pytest.raises(TimeoutError, match=r"id did not come within 0\.1 s"):
        connect_over(exchange, "tp", False, 0.1, connect=lambda store: None, check=lambda: None)
    never.set_result(None)  # lets the thread end
