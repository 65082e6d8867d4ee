"""Another number of ranks while the requests of a rig run."""

from __future__ import annotations

import time
from collections.abc import Callable

from formation_rig import READY_WITHIN_S, Rig

from phalanx.engine.resizing import EngineResizing
from phalanx.executor.local import LocalLauncher
from phalanx.membership.resize import Size
from phalanx.protocol.client import EngineMessage, Resize, ResizeBegun, ResizeEnded


def run_through(rig: Rig, size: Size, meanwhile: Callable[[EngineResizing], object] = lambda _: None) -> ResizeEnded:
    """Requests run until the resize is over; gives how it has ended.

    `meanwhile` is called once before anything is told of it, then after each step.
    """
    told: list[EngineMessage] = []
    resizing = EngineResizing(rig.formation, rig.brain, told.append)
    resizing.begin(Resize(7, *size))
    resize = resizing._resize
    if resize is not None:
        meanwhile(resizing)

    def after(_: int) -> None:
        resizing.follow()
        if resizing.is_under_way:
            meanwhile(resizing)

    expires_at = time.monotonic() + READY_WITHIN_S
    while resizing.is_under_way:
        assert time.monotonic() < expires_at, told
        assert rig.run(after) == rig.expected
    ended = told[-1]
    assert isinstance(ended, ResizeEnded) and ended.number == 7
    has_begun = resize is not None and resize.has_begun
    assert (ResizeBegun(7) in told) == has_begun
    assert ended.ending == "cancelled" or has_begun == (ended.ending != "refused")
    return ended


def once(harm: Callable[[], bool]) -> Callable[[EngineResizing], None]:
    """Until it has been done."""
    done = [False]

    def meanwhile(_: EngineResizing) -> None:
        done[0] = done[0] or harm()

    return meanwhile


def cancel_once_begun(resizing: EngineResizing) -> None:
    assert resizing._resize is not None
    if resizing._resize.has_begun:
        resizing.cancel(7)


def pids_that_come(rig: Rig) -> dict[int, int]:
    """Of the ranks that are prepared."""
    assert rig.formation._resizer is not None
    preparation = rig.formation._resizer._preparation
    ranks = None if preparation is None else preparation.interruption._ranks
    if isinstance(ranks, LocalLauncher):
        return ranks.pids()
    return {placed.rank: placed.pid for placed in getattr(ranks, "placed", ())}  # of Ray
