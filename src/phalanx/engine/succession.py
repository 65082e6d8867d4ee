"""How a brain goes on with ranks that take over from others, which may still be about to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from phalanx.engine.blame import came_from_outside
from phalanx.engine.brain import Brain
from phalanx.errors import PhalanxError
from phalanx.membership.ending import Ending
from phalanx.membership.formation import Formation, Healed
from phalanx.membership.lines import END_DEADLINE_S

COPY_DEADLINE_S = 30.0
LOOK_S = 0.05


class Succession:
    """For the brain's thread."""

    def __init__(self, brain: Brain, formation: Formation) -> None:
        self._brain = brain
        self._formation = formation
        self._before: tuple[Ending, ...] = ()
        """Ranks for which blocks are set aside."""

    def go_on(self, healed: Healed, error: PhalanxError, meanwhile: Callable[[], None] = lambda: None) -> None:
        """After `error`. Blocks until those before are gone if the KV cache lacks room for not waiting; `meanwhile` is
        then called several times a second.

        Raises DeadlineError if one of them cannot be ended.
        """
        self._before += healed.endings
        may_go_on = self._brain.rewind(
            healed.epoch,
            keeps_cache=healed.keeps_cache,
            failure=str(error),
            is_from_outside=came_from_outside(error),
            sets_aside=not all(ending.are_gone for ending in self._before),
        )
        if not may_go_on:
            self._await_ends(meanwhile)
        with suppress(PhalanxError):  # the next step raises it as well, and is healed
            for command in self._brain.copies:
                self._formation.submit(command, ranks=(), deadline_s=COPY_DEADLINE_S)

    def _await_ends(self, meanwhile: Callable[[], None]) -> None:
        began_at = time.monotonic()
        for ending in self._before:
            while not ending.wait(LOOK_S):
                meanwhile()
                if (waited_s := time.monotonic() - began_at) > END_DEADLINE_S:
                    raise ending.late(waited_s)

    def look(self) -> None:
        """Between two steps: give blocks back to those who may have them again. Never blocks."""
        if self._before and all(ending.are_gone for ending in self._before) and self._brain.restore_blocks():
            self._before = ()
