"""Who gets a request: prefix cache and load."""

from __future__ import annotations

import numpy as np

from phalanx.engine.router import MAX_DIGESTS, SLACK, Router, choose


def loads(*counts: int) -> dict[int, int]:
    """Requests of each replica."""
    return dict(enumerate(counts))


def test_the_idlest_of_those_that_have_as_much() -> None:
    assert choose([0, 0, 0], [3, 1, 2]) == 1
    assert choose([8, 8, 0], [3, 2, 0]) == 1


def test_a_cached_beginning_is_worth_a_few_requests() -> None:
    assert choose([16, 0], [SLACK, 0]) == 0
    assert choose([16, 0], [SLACK + 1, 0]) == 1


def test_what_begins_alike_goes_to_the_same_replica() -> None:
    router = Router(block_size=4)
    first = router.pick(range(10), loads(0, 0))
    other = router.pick(range(100, 110), loads(1 - first, first))
    assert other != first
    assert router.pick([*range(8), 77, 78], loads(2, 2)) == first
    assert router.pick([*range(100, 104), 5], loads(2, 2)) == other


def test_a_replica_that_takes_no_more_gets_nothing() -> None:
    router = Router(block_size=4)
    home = router.pick(range(8), loads(0, 0, 0))
    counts = loads(5, 5, 5)
    del counts[home]
    assert router.pick(range(8), counts) != home
    assert router.pick(range(8), {home: 99}) == home


def test_what_is_forgotten_of_a_replica_is_not_looked_for_there() -> None:
    router = Router(block_size=4)
    assert router.pick(range(8), loads(0, 1)) == 0
    assert router.pick(range(8), loads(1, 0)) == 0
    router.forget(0)
    router.forget(7)
    assert router.pick(range(8), loads(1, 0)) == 1


def test_of_several_that_have_a_beginning_the_idler_one_gets_it() -> None:
    router = Router(block_size=4)
    assert router.pick(range(8), loads(0, 1, 1)) == 0
    assert router.pick(range(8), loads(SLACK + 1, 0, 1)) == 1, "the only one that has it is too busy"
    assert router.pick(range(8), loads(1, 3, 0)) == 0
    assert router.pick(range(8), loads(3, 1, 0)) == 1
    assert router.pick([*range(8), *range(50, 54)], loads(3, 1, 0)) == 1
    assert router.pick([*range(8), *range(50, 54)], loads(1, 3, 0)) == 1, (
        "it has more of this one than the idler replica"
    )


def test_it_forgets_what_a_replica_was_given_long_ago() -> None:
    router = Router(block_size=1)
    most = MAX_DIGESTS // 2
    for _ in range(2):
        router.pick([-1, -2, -3], loads(0, 1))
        router.pick([-1, -2, -3], loads(SLACK + 1, 0))
        assert router.pick(range(most), loads(0, 1)) == 0
    assert [len(given) for given in router._given.values()] == [most, 3], "the other one still has what came to it"
    assert router.pick([-1, -2, -3], loads(0, 1)) == 1


def test_the_end_of_a_long_request_is_forgotten_before_its_beginning() -> None:
    router = Router(block_size=1)
    router.pick(range(MAX_DIGESTS // 2), loads(0, 1))
    router.pick(range(-100, 0), loads(0, 1))
    digests = router._digests(np.arange(MAX_DIGESTS // 2, dtype=np.int32))
    assert router._given[0].num_leading(digests) == MAX_DIGESTS // 2 - 100
