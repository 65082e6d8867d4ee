"""Letting go of what an error holds on to."""

from __future__ import annotations

import traceback


def forget_locals(error: BaseException | None) -> None:
    """Let go of what the calls held that an error came through: the executor, and so the memory of its queue."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # its frames lead to those that called them
        error = error.__cause__ or error.__context__
