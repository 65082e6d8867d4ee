"""Whoever is looked after beats, or hangs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phalanx.executor.beats import SILENT_CHECKS, STARTING_CHECKS, Beating, Beats


@pytest.fixture
def beats() -> Iterator[Beats]:
    beats = Beats()
    yield beats
    beats.close()


def test_one_beat_in_all_that_time_is_enough(beats: Beats) -> None:
    beating = Beating(beats.descriptor)
    for _ in range(3):
        beating.beat()
        assert not any(beats.have_stopped() for _ in range(SILENT_CHECKS))
    beating.beat()
    assert [beats.have_stopped() for _ in range(SILENT_CHECKS + 2)] == [False] * SILENT_CHECKS + [True, False], "once"


def test_each_process_has_longer_for_its_first_one(beats: Beats) -> None:
    beating = Beating(beats.descriptor)
    for _ in range(2):
        assert not any(beats.have_stopped() for _ in range(STARTING_CHECKS + SILENT_CHECKS - 1))
        assert beats.have_stopped()
        beats.begin()
    beating.beat()
    for _ in range(SILENT_CHECKS // 2):
        beats.have_stopped()
    beating.beat()  # and ends
    beats.begin()
    assert not any(beats.have_stopped() for _ in range(STARTING_CHECKS + SILENT_CHECKS - 1)) and beats.have_stopped()
