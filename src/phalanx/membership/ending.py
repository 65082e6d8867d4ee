"""The end of a line that has failed: its processes are killed, and what they used is let go of, while others go on."""

from __future__ import annotations

import logging
import threading

from phalanx.errors import DeadlineError
from phalanx.executor.executor import Executor

AGAIN_S = 1.0
"""Between two tries to end what the kernel does not end."""

log = logging.getLogger("phalanx.membership")


class Ending:
    """Begins at once, in a thread of its own, and does not give up. For any thread."""

    def __init__(self, epoch: int, executor: Executor) -> None:
        self._epoch = epoch
        self._are_gone = threading.Event()
        self._is_given_up = threading.Event()
        self._thread = threading.Thread(target=self._carry_out, args=(executor,), name="phalanx-retiring", daemon=True)
        self._thread.start()

    @property
    def are_gone(self) -> bool:
        """Whether no process of its ranks is left, nor anything that a GPU computed for them."""
        return self._are_gone.is_set()

    @property
    def is_done(self) -> bool:
        """Whether they are gone, and all that they used is let go of."""
        return self.are_gone and not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Block until they are gone; whether they are by then."""
        return self._are_gone.wait(timeout_s)

    def late(self, waited_s: float) -> DeadlineError:
        """What to raise if they are not."""
        return DeadlineError("the end of its ranks", f"the line of epoch {self._epoch}", waited_s)

    def join(self, timeout_s: float) -> None:
        """Wait until all that they used is let go of; then nobody is left who cares."""
        self._thread.join(timeout_s)
        self._is_given_up.set()

    def _carry_out(self, executor: Executor) -> None:
        while not self._is_given_up.is_set():
            try:
                executor.kill()
            except Exception:  # the kernel does not end one, or there is no descriptor left to see to it
                log.exception("ranks of epoch %d have not ended", self._epoch)
                self._is_given_up.wait(AGAIN_S)
                continue
            self._are_gone.set()
            executor.close()
            return
