"""Whoever is looked after beats, or hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phalanx.executor.beats import SILENT_CHECKS, Beating, Beats


@pytest.fixture
def beats() -> Iterator[Beats]:
    beats = Beats()
    yield beats
    beats.close()


def test_one_beat_in_all_that_time_is_enough(beats: Beats) -> None:
    beating = Beating(beats.descriptor)
    for _ in range(3):
        assert not any(beats.have_stopped() for _ in range(SILENT_CHECKS - 1))
        beating.beat()
    assert [beats.have_stopped() for _ in range(SILENT_CHECKS + 1)] == [False] * SILENT_CHECKS + [True]


def test_another_process_has_all_the_time_again(beats: Beats) -> None:
    Beating(beats.descriptor).beat()
    for _ in range(SILENT_CHECKS + 1):
        beats.have_stopped()
    beats.begin()
    assert not any(beats.have_stopped() for _ in range(SILENT_CHECKS - 1)) and beats.have_stopped()
