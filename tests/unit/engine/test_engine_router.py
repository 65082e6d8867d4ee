"""Who gets a request: prefix cache and load."""

from __future__ import annotations

from phalanx.engine.router import MAX_DIGESTS, SLACK, Router, choose


def test_the_idlest_of_those_that_have_as_much() -> None:
    assert choose([0, 0, 0], [3, 1, 2]) == 1
    assert choose([8, 8, 0], [3, 2, 0]) == 1


def test_a_cached_beginning_is_worth_a_few_requests() -> None:
    assert choose([16, 0], [SLACK, 0]) == 0
    assert choose([16, 0], [SLACK + 1, 0]) == 1


def test_what_begins_alike_goes_to_the_same_replica() -> None:
    router = Router(block_size=4)
    first = router.pick(range(10), [0, 0])
    other = router.pick(range(100, 110), [1 - first, first])
    assert other != first
    assert router.pick([*range(8), 77, 78], [2, 2]) == first
    assert router.pick([*range(100, 104), 5], [2, 2]) == other


def test_a_replica_that_takes_no_more_gets_nothing() -> None:
    router = Router(block_size=4)
    home = router.pick(range(8), [0, 0, 0])
    counts: list[int | None] = [5, 5, 5]
    counts[home] = None
    assert router.pick(range(8), counts) != home


def test_it_forgets_what_was_long_ago() -> None:
    router = Router(block_size=1)
    router.pick(range(MAX_DIGESTS), [0, 1])
    router.pick([-1, *range(100)], [0, 1])
    assert len(router._replica_of) == MAX_DIGESTS
