"""A line that stands ready, prepared and looked after by a thread of its own while another one computes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from phalanx.errors import DeadlineError, PhalanxError
from phalanx.executor.pending import Pending
from phalanx.membership.forgetting import forget_locals
from phalanx.membership.lines import Interruption, Line, end
from phalanx.protocol.worker import Ping, ReplyBody

SETTLE_S = 0.5
"""After a line was taken, it is left alone with the cores for so long."""

LOOK_S = 0.5
ANSWER_S = 5.0
"""A standby line that does not answer for so long, though it has nothing to do, is replaced."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Between two tries to prepare one, the more the more often it has failed."""

Prepare = Callable[[Interruption], Line]

log = logging.getLogger("phalanx.membership")


class Standby:
    """For any thread."""

    def __init__(self, prepare: Prepare) -> None:
        """`prepare` starts a line, blocking until it is ready."""
        self.num_faults = 0
        """Lines that did not come up, or did not last."""
        self._prepare = prepare
        self._line: Line | None = None
        self._is_preparing = False
        self._is_wanted = True
        self._is_closed = False
        self._begins_at = time.monotonic()
        self._begun_at = 0.0
        self._took_s = 0.0
        """To prepare the last one that came up."""
        self._pause_s = FIRST_PAUSE_S
        self._interruption = Interruption()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="phalanx-standby", daemon=True)
        self._thread.start()

    @property
    def state(self) -> Literal["preparing", "ready"]:
        with self._changed:
            return "ready" if self._line is not None else "preparing"

    @property
    def due_in_s(self) -> float:
        """When the one that is being prepared is ready if it takes as long as the last one did; 0 if there is none, or
        it should be ready by now, or nothing is known of that."""
        with self._changed:
            return max(self._begun_at + self._took_s - time.monotonic(), 0.0) if self._is_preparing else 0.0

    def take(self, timeout_s: float) -> Line | None:
        """The line that is ready, or is while it is waited for; None if there will be none.

        From now on no other one is prepared, before `renew`.
        """
        with self._changed:
            self._is_wanted = False
            self._changed.wait_for(lambda: self._line is not None or not self._is_preparing, timeout_s)
            line, self._line = self._line, None
            if line is not None:
                self._interruption = Interruption()  # from now on it is not ours to end
            self._changed.notify_all()
            return line

    def renew(self) -> None:
        """Prepare another one, soon."""
        with self._changed:
            self._is_wanted = True
            self._begins_at = time.monotonic() + SETTLE_S
            self._changed.notify_all()

    def discard(self, end_line: Callable[[Line], None] = end) -> None:
        """End the line that is ready or is prepared: it, or what it is made from, is of no use any more.

        One that is ready is ended by `end_line`, which by default blocks until its processes are gone."""
        with self._changed:
            self._is_wanted = False
            line, self._line = self._line, None
            interruption = self._interruption
            if line is not None:
                self._interruption = Interruption()  # which would kill them: to their watcher that is a fault
            else:
                interruption.is_set = True  # or it would still be offered, and then be killed
            self._changed.notify_all()
        if line is not None:
            self._let_go(line, end_line)
        else:
            interruption.begin()

    def clear(self, timeout_s: float) -> None:
        """As `discard`; returns when nothing of it is left, not even of a line that was just being prepared.

        Raises DeadlineError.
        """
        self.discard()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_preparing, timeout_s):
                raise DeadlineError("the end of a line that was being prepared", "the standby line", timeout_s)

    def close(self) -> None:
        """Prepare none any more, and end what there is. Raises DeadlineError."""
        with self._changed:
            self._is_closed = True
        self.discard()
        self._interruption.end(self._thread)

    def _run(self) -> None:
        while not self._is_closed:
            self._take_turn()  # and hold nothing of a line that is gone

    def _take_turn(self) -> None:
        if (lost := self._await_turn()) is not None:
            self._let_go(lost)
        elif not self._is_closed:
            self._try()

    def _try(self) -> None:
        try:
            line = self._prepare(self._interruption)
        except Exception as error:  # such as a lack of memory: the line that computes is not to suffer from it
            if not isinstance(error, PhalanxError):
                log.exception("a standby line cannot be prepared")
            self._give_up(error)
        else:
            self._offer(line)

    def _await_turn(self) -> Line | None:
        """Look after the line that is there, and give it back if it is lost; None when one is to be prepared."""
        heartbeat: Pending[list[ReplyBody]] | None = None
        with self._changed:
            while not self._is_closed:
                left_s = LOOK_S
                if self._line is None:
                    heartbeat = None
                    left_s = self._begins_at - time.monotonic() if self._is_wanted else LOOK_S
                    if left_s <= 0:
                        self._is_preparing = True
                        self._begun_at = time.monotonic()
                        self._interruption = Interruption()
                        return None
                else:
                    try:
                        heartbeat = _looked_after(self._line, heartbeat)
                    except Exception as error:
                        return self._lost(self._line, error)
                self._changed.wait(min(left_s, LOOK_S))
        return None

    def _lost(self, line: Line, error: Exception) -> Line:
        log.warning("the standby line (epoch %d) is lost: %s", line.epoch, error)
        self._line = None
        self._put_off()
        return line

    def _offer(self, line: Line) -> None:
        with self._changed:
            self._is_preparing = False
            is_of_use = not self._is_closed and not self._interruption.is_set
            if is_of_use:
                self._line = line
                self._pause_s = FIRST_PAUSE_S
                self._took_s = time.monotonic() - self._begun_at
            self._changed.notify_all()
        if is_of_use:
            log.info("a standby line is ready (epoch %d)", line.epoch)
        else:
            self._let_go(line)

    def _let_go(self, line: Line, end_line: Callable[[Line], None] = end) -> None:
        """End it. What cannot be ended is said: nothing more can be done about it, and other lines come."""
        try:
            end_line(line)
        except Exception:
            with self._changed:
                self.num_faults += 1
            log.exception("a standby line (epoch %d) did not end", line.epoch)

    def _give_up(self, error: Exception) -> None:
        forget_locals(error)
        with self._changed:
            self._is_preparing = False
            if not self._is_closed and not self._interruption.is_set:
                log.warning("no standby line: %s; the next try comes in %.0f s", error, self._pause_s)
                self._put_off()
            self._changed.notify_all()

    def _put_off(self) -> None:
        self.num_faults += 1
        self._begins_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def _looked_after(line: Line, heartbeat: Pending[list[ReplyBody]] | None) -> Pending[list[ReplyBody]]:
    """Blocks for nobody. Raises what has ended the line."""
    if heartbeat is None or heartbeat.done():
        return line.executor.submit(Ping(), deadline_s=ANSWER_S)
    return heartbeat
