from __future__ import annotations

import gc
import weakref
from contextlib import suppress

from phalanx.membership.forgetting import forget_locals


class Line:
    """Something to hold, and the error that has ended it."""

    error: Exception | None = None


def fail(line: Line) -> None:
    try:
        raise OSError("the queue is closed")
    except OSError as error:
        line.error = RuntimeError("rank 1 died")
        raise line.error from error


def look_after() -> weakref.ref[Line]:
    line = Line()
    with suppress(RuntimeError):
        fail(line)
    forget_locals(line.error)
    return weakref.ref(line)


def test_an_error_that_is_over_keeps_nobody_who_has_it() -> None:
    """Not until the collector comes: what it holds is the memory of a queue."""
    gc.disable()
    try:
        assert look_after()() is None
    finally:
        gc.enable()
