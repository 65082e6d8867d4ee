"""How much of a request that is about to move here goes into a step: what others wait for is two of their steps."""

from __future__ import annotations

import random

from phalanx.engine.pace import ALONE_S, LEAST, LOOK_AGAIN_AFTER, MOST, Pace, StepTokens


def test_a_step_with_such_tokens_takes_twice_as_long_as_one_without() -> None:
    pace, dice = Pace(), random.Random(1)
    longest_s = 0.0
    for _ in range(200):
        num_ahead = pace.limits.beside
        took_s = (0.04 + 0.0015 * num_ahead) * dice.uniform(0.95, 1.05)
        pace.note(took_s, StepTokens(4, 0, num_ahead))
        longest_s = max(longest_s, took_s)
    assert 0.06 < longest_s < 0.08
    assert 14 <= pace.limits.beside <= 20


def test_the_first_tokens_cost_less() -> None:
    """They are computed in the time that weights take to be read."""
    pace, sizes = Pace(), []
    pace.note(0.04, StepTokens(4, 0, 0))
    for _ in range(10):
        sizes.append(pace.limits.beside)
        took_s = max(0.045, 0.0015 * (sizes[-1] + 4))
        pace.note(took_s, StepTokens(4, 0, sizes[-1]))
        assert took_s <= 0.08, sizes
    assert sizes[-1] > 20


def test_what_others_take_is_found_out_first_and_looked_at_again() -> None:
    pace = Pace()
    assert pace.limits.beside == 0 < pace.limits.alone
    pace.note(0.02, StepTokens(4, 0, 0))
    counts = []
    for _ in range(2 * LOOK_AGAIN_AFTER + 2):
        counts.append(pace.limits.beside)
        pace.note(0.02 + 0.001 * counts[-1], StepTokens(4, 0, counts[-1]))
    assert [i for i, count in enumerate(counts) if not count] == [LOOK_AGAIN_AFTER, 2 * LOOK_AGAIN_AFTER + 1]


def test_alone_it_is_as_much_as_one_who_comes_in_may_wait_for() -> None:
    pace = Pace()
    sizes = []
    for _ in range(20):
        sizes.append(pace.limits.alone)
        pace.note(0.001 * sizes[-1], StepTokens(0, 0, sizes[-1]))
    assert sizes[:3] == [2 * LEAST, 4 * LEAST, 8 * LEAST], "a few tokens tell little of many"
    assert sizes[-1] == int(ALONE_S / 0.001)


def test_between_the_least_and_the_most() -> None:
    slow, fast = Pace(), Pace()
    for pace, token_s in ((slow, 1.0), (fast, 0.0)):
        pace.note(0.01, StepTokens(1, 0, 0))
        for _ in range(30):
            num_ahead = pace.limits.beside
            pace.note(0.01 + token_s * num_ahead, StepTokens(1, 0, num_ahead))
    assert slow.limits.beside == LEAST
    assert fast.limits.beside == MOST


def test_beside_prompts_nothing_is_learned() -> None:
    pace = Pace()
    pace.note(0.01, StepTokens(1, 0, 0))
    before = pace.limits
    pace.note(5.0, StepTokens(1, 500, 8))
    assert pace.limits == before
