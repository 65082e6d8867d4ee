"""The end of a line that has failed: its processes are killed, and what they used is let go of, while others go on."""

from __future__ import annotations

import logging
import threading

from phalanx.errors import DeadlineError, PhalanxError
from phalanx.membership.lines import END_DEADLINE_S, Line

log = logging.getLogger("phalanx.membership")


class Ending:
    """Begins at once, in a thread of its own. For any thread."""

    def __init__(self, line: Line) -> None:
        self._epoch = line.epoch
        self._failure: PhalanxError | None = None
        self._is_settled = threading.Event()
        self._thread = threading.Thread(target=self._carry_out, args=(line,), name="phalanx-retiring", daemon=True)
        self._thread.start()

    @property
    def are_gone(self) -> bool:
        """Whether no process of its ranks is left, nor anything that a GPU computed for them."""
        return self._is_settled.is_set() and self._failure is None

    @property
    def is_done(self) -> bool:
        """Whether they are gone, and all that they used is let go of."""
        return self.are_gone and not self._thread.is_alive()

    def wait(self) -> None:
        """Block until they are gone. Raises DeadlineError if the kernel cannot end one."""
        if not self._is_settled.wait(END_DEADLINE_S):
            raise DeadlineError("the end of its ranks", f"the line of epoch {self._epoch}", END_DEADLINE_S)
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait until all that they used is let go of, for END_DEADLINE_S at most."""
        self._thread.join(END_DEADLINE_S)

    def _carry_out(self, line: Line) -> None:
        try:
            line.executor.kill()
        except PhalanxError as failure:
            self._failure = failure
            log.error("ranks of epoch %d did not end: %s", self._epoch, failure)
        finally:
            self._is_settled.set()
        if self._failure is None:  # else they may use it yet
            line.executor.close()
