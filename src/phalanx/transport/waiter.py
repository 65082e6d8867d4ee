"""How an end of a queue waits for frames."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from phalanx.errors import PhalanxError
from phalanx.transport.futex import new_fence

Found = TypeVar("Found")

_SCORE_TO_SPIN = 16
_LONG_WAIT_COSTS = 8
"""In short waits. The answers to one call come shortly after each other, also when the call takes long."""


class Bell(Protocol):
    """Where an end sleeps: it reads `value`, fences, looks for what it awaits, and waits for the value to change."""

    def value(self) -> int:
        """The count now."""

    def ring(self) -> None:
        """Wake who waits. Any thread; never blocks."""

    def wait(self, seen: int, timeout_s: float | None) -> bool:
        """Block until the bell was rung since `seen`: True; or for `timeout_s` (None: no limit): False."""


class SpinTime:
    """How long to spin: `short_s`, or `long_s` as long as hardly any wait takes longer than that.

    Between nodes a round trip takes longer than anybody should spin who waits for something rare. When calls follow
    each other at once, though, it is sleeping and waking that takes most of the time. (KVM polls before it halts a
    virtual processor by a similar rule: Documentation/virt/kvm/halt-polling.rst of Linux.)
    """

    def __init__(self, short_s: float, long_s: float = 0.0) -> None:
        self._short_s = short_s
        self._long_s = max(long_s, short_s)
        self._score = 0
        self.now_s = short_s

    def adapt(self, waited_s: float) -> None:
        """Something came after a wait of `waited_s` seconds."""
        if waited_s > self._long_s:
            self._score = max(self._score - _LONG_WAIT_COSTS, 0)
        elif self._score < 2 * _SCORE_TO_SPIN:
            self._score += 1
        self.now_s = self._long_s if self._score >= _SCORE_TO_SPIN else self._short_s


class Waiter:
    """How an end waits for frames: it spins for a bounded time, yielding its core, then sleeps on its bell."""

    def __init__(self, bell: Bell, spin: SpinTime) -> None:
        self._bell = bell
        self._fence = new_fence()
        self._spin_time = spin

    def wait_for(
        self,
        poll: Callable[[], Found | None],
        *,
        death: Callable[[], PhalanxError | None],
        until: Callable[[], bool],
        timeout_s: float | None,
    ) -> Found | None:
        """What `poll` finds. None after `timeout_s` or as soon as `until()`. Raises what `death` returns."""
        started = time.monotonic()
        deadline = None if timeout_s is None else started + timeout_s
        if self._spin_time.now_s and timeout_s != 0:
            found = self._spin(poll, started + self._spin_time.now_s)
            if found is not None:
                self._spin_time.adapt(0.0)
                return found
        while True:
            seen = self._bell.value()
            self._fence()
            gone = death()  # before the poll, which then finds everything that a dead party had sent
            found = poll()
            if found is not None:
                self._spin_time.adapt(time.monotonic() - started)
                return found
            if gone is not None:
                raise gone
            if until():
                return None
            remaining_s = None if deadline is None else deadline - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                return None
            self._bell.wait(seen, remaining_s)

    def _spin(self, poll: Callable[[], Found | None], end: float) -> Found | None:
        # Polls rather than looks at the bell: a frame can be seen about a microsecond before its bell rings.
        while True:
            found = poll()
            if found is not None:
                return found
            if time.monotonic() >= end:
                return None
            os.sched_yield()
