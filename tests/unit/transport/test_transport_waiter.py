"""Who spins for long, and when it stops."""

from __future__ import annotations

from phalanx.transport.waiter import SpinTime

SHORT_S, LONG_S = 25e-6, 500e-6


def _after(spin: SpinTime, *waits_s: float) -> float:
    for waited_s in waits_s:
        spin.adapt(waited_s)
    return spin.now_s


def test_nobody_spins_for_long_at_first() -> None:
    spin = SpinTime(SHORT_S, LONG_S)
    assert spin.now_s == SHORT_S
    assert _after(spin, *[100e-6] * 10) == SHORT_S


def test_calls_that_follow_each_other_at_once_are_spun_for() -> None:
    spin = SpinTime(SHORT_S, LONG_S)
    assert _after(spin, *[100e-6] * 40) == LONG_S
    assert _after(spin, 0.010) == LONG_S  # a single hiccup is none


def test_steps_of_some_milliseconds_are_not_though_their_answers_come_together() -> None:
    spin = SpinTime(SHORT_S, LONG_S)
    assert _after(spin, *[0.010, 10e-6, 10e-6, 10e-6] * 100) == SHORT_S


def test_it_stops_soon_when_calls_become_rare() -> None:
    spin = SpinTime(SHORT_S, LONG_S)
    assert _after(spin, *[100e-6] * 1000) == LONG_S
    assert _after(spin, *[0.010] * 3) == SHORT_S


def test_without_a_long_time_there_is_only_the_short_one() -> None:
    spin = SpinTime(SHORT_S)
    assert _after(spin, *[1e-6] * 100) == SHORT_S
