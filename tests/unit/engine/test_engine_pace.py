"""How much of a request that is about to move here goes into a step: what others wait for is two of their steps."""

from __future__ import annotations

import random

from phalanx.engine.pace import ALONE_S, LEAST, LOOK_AGAIN_AFTER, MOST, Pace


def test_a_step_with_such_tokens_takes_twice_as_long_as_one_without() -> None:
    pace, dice = Pace(), random.Random(1)
    longest_s = 0.0
    for _ in range(200):
        num_ahead = pace.limits.beside
        took_s = (0.04 + 0.0015 * num_ahead) * dice.uniform(0.95, 1.05)
        pace.note(took_s, num_ahead, num_others=4)
        longest_s = max(longest_s, took_s)
    assert 0.075 < longest_s < 0.095
    assert 22 <= pace.limits.beside <= 32


def test_what_others_take_is_found_out_first_and_looked_at_again() -> None:
    pace = Pace()
    assert pace.limits.beside == 0 < pace.limits.alone
    pace.note(0.02, 0, 4)
    counts = []
    for _ in range(2 * LOOK_AGAIN_AFTER + 2):
        counts.append(pace.limits.beside)
        pace.note(0.02 + 0.001 * counts[-1], counts[-1], 4)
    assert [i for i, count in enumerate(counts) if not count] == [LOOK_AGAIN_AFTER, 2 * LOOK_AGAIN_AFTER + 1]


def test_alone_it_is_as_much_as_one_who_comes_in_may_wait_for() -> None:
    pace = Pace()
    sizes = []
    for _ in range(20):
        sizes.append(pace.limits.alone)
        pace.note(0.001 * sizes[-1], sizes[-1], num_others=0)
    assert sizes[:3] == [2 * LEAST, 4 * LEAST, 8 * LEAST], "a few tokens tell little of many"
    assert sizes[-1] == int(ALONE_S / 0.001)


def test_between_the_least_and_the_most() -> None:
    slow, fast = Pace(), Pace()
    for pace, token_s in ((slow, 1.0), (fast, 0.0)):
        pace.note(0.01, 0, 1)
        for _ in range(20):
            pace.note(0.01 + token_s * pace.limits.beside, pace.limits.beside, 1)
    assert slow.limits.beside == LEAST
    assert fast.limits.beside == MOST
