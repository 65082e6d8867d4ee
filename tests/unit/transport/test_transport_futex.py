from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from phalanx.errors import StartError
from phalanx.transport.futex import Doorbell, new_fence, spin_s_for
from phalanx.transport.shared_memory import SharedSegment


@pytest.fixture
def segment() -> Iterator[SharedSegment]:
    with SharedSegment.create(64, "bell") as made:
        yield made


def _in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_ring_is_counted_in_every_mapping(segment: SharedSegment) -> None:
    with SharedSegment.attach(segment.handle) as other:
        ours, theirs = Doorbell(segment.buf[:4]), Doorbell(other.buf[:4])
        ours.ring()
        theirs.ring()
        assert ours.value() == theirs.value() == 2
        del theirs


def test_wait_returns_at_once_if_it_has_rung_since(segment: SharedSegment) -> None:
    bell = Doorbell(segment.buf[:4])
    bell.ring()
    assert bell.wait(0, timeout_s=None)


def test_wait_ends_at_its_timeout(segment: SharedSegment) -> None:
    bell = Doorbell(segment.buf[:4])
    started = time.monotonic()
    assert not bell.wait(0, timeout_s=0.02)
    assert 0.02 <= time.monotonic() - started < 1


def test_a_ring_wakes_every_sleeper(segment: SharedSegment) -> None:
    bell = Doorbell(segment.buf[:4])
    woken = []
    sleepers = [_in_thread(lambda: woken.append(bell.wait(0, timeout_s=10))) for _ in range(3)]
    bell.ring()
    for sleeper in sleepers:
        sleeper.join(10)
    assert woken == [True] * 3


def test_the_count_wraps(segment: SharedSegment) -> None:
    segment.buf[:4] = b"\xff\xff\xff\xff"
    bell = Doorbell(segment.buf[:4])
    seen = bell.value()
    bell.ring()
    assert bell.value() == 0
    assert bell.wait(seen, timeout_s=0)


def test_several_ringers_lose_no_ring(segment: SharedSegment) -> None:
    num_ringers, num_rings = 4, 2000
    bell = Doorbell(segment.buf[:4])

    def ring() -> None:
        own = Doorbell(segment.buf[:4])
        for _ in range(num_rings):
            own.ring()

    ringers = [_in_thread(ring) for _ in range(num_ringers)]
    seen = 0
    while seen < num_ringers * num_rings:
        assert bell.wait(seen, timeout_s=10)
        seen = bell.value()
    for ringer in ringers:
        ringer.join(10)
    assert bell.value() == num_ringers * num_rings


def test_a_sleeper_takes_no_cpu(segment: SharedSegment) -> None:
    bell = Doorbell(segment.buf[:4])
    before = time.process_time()
    assert not bell.wait(0, timeout_s=0.5)
    assert time.process_time() - before < 0.01


def test_a_sleeper_lets_go_of_the_gil(segment: SharedSegment) -> None:
    bell = Doorbell(segment.buf[:4])
    sleeper = _in_thread(lambda: bell.wait(0, timeout_s=10) or None)
    bell.ring()  # would never be reached otherwise
    sleeper.join(10)
    assert not sleeper.is_alive()


def test_an_unknown_machine_is_an_error(segment: SharedSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(StartError, match="s390x"):
        Doorbell(segment.buf[:4])


def test_a_fence_can_be_used_again_and_again() -> None:
    fence = new_fence()
    for _ in range(3):
        fence()


def test_parties_spin_for_less_when_they_share_cores_and_not_at_all_when_they_crowd_them() -> None:
    cores = len(os.sched_getaffinity(0))
    assert spin_s_for(cores) > spin_s_for(cores + 1) > 0
    assert spin_s_for(100_000) == 0
