"""One change of a formation's size, from the wish to its end: which state follows which. Pure: no process, no clock.

    checking ─▶ preparing ─▶ ready ─▶ done
        └───────────┴──────────┴────▶ undoing ─▶ failed | cancelled

There is one commit: the step from `ready` to `done`. Whatever happens before it, to whomever, undoes the resize, and
the line that serves goes on as if it had never been asked for. After it there is nothing to undo: what then happens
happens to the line of the new size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from phalanx.errors import ConfigError, ResizeRefusedError, ResizeUnderWayError

ResizeState = Literal["checking", "preparing", "ready", "undoing", "done", "failed", "cancelled"]
Ending = Literal["failed", "cancelled"]


class Size(NamedTuple):
    """Of a formation, as far as it can change."""

    data_parallel_size: int
    tensor_parallel_size: int

    def changed(self, data_parallel_size: int | None, tensor_parallel_size: int | None) -> Size:
        """What is None stays. Raises ConfigError for what is no size."""
        asked = {"data_parallel_size": data_parallel_size, "tensor_parallel_size": tensor_parallel_size}
        for name, size in asked.items():
            if size is not None and size < 1:
                raise ConfigError(name, size, "it must be at least 1")
        return self._replace(**{name: size for name, size in asked.items() if size is not None})

    def __str__(self) -> str:
        return f"DP {self.data_parallel_size}, TP {self.tensor_parallel_size}"


class LineResize:
    """One resize, under way or over."""

    def __init__(self, before: Size, asked: Size) -> None:
        self.before = before
        self.asked = asked
        self.state: ResizeState = "checking"
        self.has_begun = False
        """There was room for it: processes of the line of the size asked for have been started."""
        self.error: Exception | None = None
        """Why it is undone; None if it is not, or was cancelled."""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def __str__(self) -> str:
        is_move = self.asked == self.before
        return f"of {self.before} to other nodes" if is_move else f"from {self.before} to {self.asked}"


class Resizing:
    """All resizes of one formation, one at a time. Each method is something that has happened."""

    def __init__(self, size: Size) -> None:
        self.size = size
        """Of the line that serves."""
        self.current: LineResize | None = None
        """Under way."""
        self._is_healing = False
        self._ending: Ending = "failed"

    def begin(self, asked: Size) -> LineResize:
        """Somebody wants another size. Raises what `check` does."""
        self.check()
        self.current = LineResize(self.size, asked)
        return self.current

    def check(self) -> None:
        """Raises ResizeRefusedError if this is not the time for another size."""
        if self.current is not None:
            raise ResizeUnderWayError(str(self.current.before), str(self.current.asked))
        if self._is_healing:
            raise ResizeRefusedError("ranks are being replaced after a fault: resize when they serve again")

    def note_room(self) -> None:
        """There is room for a line of the size asked for: from now on there are processes of it."""
        if self.current is not None and self.current.state == "checking":
            self.current.state, self.current.has_begun = "preparing", True

    def prepared(self) -> None:
        """That line is ready to step. It comes too late if it is to be undone."""
        self.note_room()
        if self.current is not None and self.current.state == "preparing":
            self.current.state = "ready"

    def failed(self, error: Exception) -> None:
        """That line has not come up, or did not last."""
        self._undo("failed", error)

    def cancel(self) -> bool:
        """Nobody wants it any more. False if it is too late, or none is under way."""
        return self._undo("cancelled", None)

    def fault(self, error: Exception) -> None:
        """The line that serves has failed, and is healed: that comes first."""
        self._is_healing = True
        self._undo("failed", error)

    def healed(self) -> None:
        """Another line of the same size serves."""
        self._is_healing = False

    def undone(self) -> None:
        """Nothing is left of the line of the size asked for."""
        assert self.current is not None and self.current.state == "undoing", self.current
        self.current.state = self._ending
        self.current = None

    def commit(self) -> None:
        """The line of the size asked for takes the next step."""
        assert self.current is not None and self.current.state == "ready", self.current
        assert not self._is_healing
        self.current.state = "done"
        self.size = self.current.asked
        self.current = None

    def _undo(self, ending: Ending, error: Exception | None) -> bool:
        """False if that is done already, or none is under way."""
        if self.current is None or self.current.state == "undoing":
            return False
        self.current.state, self.current.error, self._ending = "undoing", error, ending
        return True
