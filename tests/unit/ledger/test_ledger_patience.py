"""How long ranks may wait follows from the steps that were made, and from how many tokens those had."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_ranks import WritingRank

from phalanx.ledger.journal_reader import Reader
from phalanx.ledger.limits import Limits
from phalanx.ledger.look import Look
from phalanx.ledger.patience import AT_FIRST_S, LEAST_S, STEPS_OF_PATIENCE, Patience
from phalanx.ledger.record import Kind, Record

LIMITS = Limits(step_timeout_s=600.0)


def step(number: int, num_tokens: int, took_s: float) -> Record:
    done_ns = 10**9 + int(took_s * 1e9) if took_s else 0
    return Record(number, 1, 0, Kind.STEP, number, num_tokens, 7, 7, 10**9, done_ns)


def after(*steps: tuple[int, float], limits: Limits = LIMITS) -> Patience:
    patience = Patience(limits)
    patience.learn(0, [step(i, *one) for i, one in enumerate(steps, start=1)])
    return patience


def test_steps_of_one_size() -> None:
    patience = after(*[(8, 0.2)] * 9, (8, 30.0))
    assert patience.of_step_s(8) == pytest.approx(STEPS_OF_PATIENCE * 0.2)
    assert after((8, 0.001)).of_step_s(8) == LEAST_S


def test_a_long_prompt_has_the_time_of_long_prompts() -> None:
    """A decode of 20 ms, a chunk of 2,048 tokens of 3 s: the one is missed after a second, the other not for 60."""
    patience = after(*[(4, 0.02)] * 50, (2048, 3.0))
    assert patience.of_step_s(4) == LEAST_S
    assert patience.of_step_s(2048) == pytest.approx(60.0)


def test_a_prompt_that_is_longer_than_any_before() -> None:
    patience = after((4, 0.05))
    assert patience.of_step_s(2048) >= 4 * 2048 / 4 * 0.05


def test_the_first_step() -> None:
    assert after().of_step_s(0) == AT_FIRST_S
    assert after().of_step_s(2048) == pytest.approx(AT_FIRST_S + 20.48)


def test_what_the_first_step_set_up_does_not_count_once_there_is_another() -> None:
    patience = Patience(LIMITS)
    for rank in range(8):  # a step is one step, however many ranks were in it
        patience.learn(rank, [step(1, 8, 3.0), step(2, 8, 0.1)])
    assert patience.of_step_s(8) == pytest.approx(STEPS_OF_PATIENCE * 0.1)


def test_never_longer_than_the_run_has() -> None:
    patience = after((2048, 3.0), limits=Limits(step_timeout_s=20.0))
    assert patience.of_step_s(2048) == 10.0
    assert after(limits=Limits(step_timeout_s=0.5)).of_step_s(2048) == LEAST_S


def test_what_was_seen_is_not_learned_twice() -> None:
    patience = Patience(LIMITS)
    for _ in range(50):
        patience.learn(0, [step(1, 8, 5.0), step(2, 8, 0.1), step(3, 8, 0.1), step(4, 8, 0.0), step(5, 8, 9.0)])
    assert patience.of_step_s(8) == pytest.approx(STEPS_OF_PATIENCE * 0.1)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0.001, 5.0)), max_size=30), st.integers(0, 4096))
def test_it_is_at_least_twenty_steps_of_such_a_size(steps: list[tuple[int, float]], num_tokens: int) -> None:
    patience = after(*steps)
    alike = [took_s for tokens, took_s in steps if tokens.bit_length() == num_tokens.bit_length()]
    assert LEAST_S <= patience.of_step_s(num_tokens) <= LIMITS.step_s
    if alike:
        assert patience.of_step_s(num_tokens) >= min(STEPS_OF_PATIENCE * min(alike), LIMITS.step_s) - 1e-6


def test_it_is_read_from_journals() -> None:
    """The largest step that is under way counts, whoever is in it."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(2)]
    patience = Patience(LIMITS)
    for rank in ranks:
        for number in range(1, 1500):  # of which the journal has the newest
            rank.begin(number)
            rank.end()
        patience.learn(rank.rank, Reader(rank.memory).steps())
        assert len(Reader(rank.memory).steps()) > 1000
    ranks[1].begin(2000, num_tokens=2048)
    look = Look(time.monotonic_ns(), {rank.rank: rank.look() for rank in ranks}, {"tp@0": (0, 1)}, LIMITS)
    assert patience.of_s(look) == patience.of_step_s(2048)
