"""How an engine's process is, as seen from the server: whether steps progress, and if not, who keeps them from it."""

from __future__ import annotations

import datetime
import os
import time
from contextlib import suppress

import msgspec

from phalanx.errors import PeerDiedError
from phalanx.ledger.report import VerdictReport, utc_now
from phalanx.protocol.client import FIRST_WEIGHTS_VERSION, FormationStats, MaintenanceStats
from phalanx.protocol.worker import FIRST_EPOCH
from phalanx.transport.liveness import Party, state_of

STOPPED_AFTER_S = 1.0
"""So long may a debugger or a snapshot hold the engine's process."""
SILENT_AFTER_S = 10.0
SILENT_SHARE = 0.5
"""Of the time that a step may take, in which the engine is silent in good order."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """At one moment."""

    replica: int = 0
    """Whose engine it is, where replicas are engines of their own."""
    pid: int
    dead: str | None = None
    """Why it has ended for good; None while it runs, and while it is started again."""
    down: str | None = None
    """Why it is being started again; None when it is not."""
    phase: str | None = None
    """While it is being started again: what it does."""
    num_restarts: int = 0
    trouble: VerdictReport | None = None
    """Why steps do not progress; None if they do, and if there are none to make. Of one that ended, what ended it."""
    since_step_s: float | None = None
    """Since it was heard last that a step was made; None before the first."""
    num_watched: int = 0
    """Ranks that the ledger's watcher looks at."""
    verdicts: dict[str, int] = {}
    """How many there have been, by cause."""
    num_watcher_restarts: int = 0
    """How often a watcher that had ended, or hung, was replaced."""
    formation: FormationStats | None = None
    """As the engine has last told; None where a fault ends it, and before it has told anything."""
    weights_version: int = FIRST_WEIGHTS_VERSION
    """Grows with each reload."""
    maintenance: MaintenanceStats | None = None
    """What is being done to it, or that it is asleep."""

    @property
    def epoch(self) -> int:
        """Of the ranks that compute."""
        return FIRST_EPOCH if self.formation is None else self.formation.epoch

    @property
    def sleep_level(self) -> int:
        """0 while it is awake."""
        return 0 if self.maintenance is None else self.maintenance.level

    @property
    def is_healthy(self) -> bool:
        return self.dead is None and self.down is None and self.trouble is None


class ProcessWatch:
    """What can be told of the engine's process without the ledger: that it is stopped, or silent. For one thread."""

    def __init__(self, pid: int, silence_in_order_s: float) -> None:
        """`silence_in_order_s`: how long it may be silent in good order."""
        self._pid, self._start_time = pid, _start_time_of(pid)
        self._silent_after_s = max(SILENT_AFTER_S, SILENT_SHARE * silence_in_order_s)
        self._stopped_at: float | None = None
        self._trouble: VerdictReport | None = None
        self.counts: dict[str, int] = {}

    def look(self, silent_s: float) -> None:
        """Called some times a second, with how long nothing was heard."""
        is_stopped = self._start_time is not None and state_of(self._pid, self._start_time) in ("T", "t")
        now = time.monotonic()
        if not is_stopped:
            self._stopped_at = None
        elif self._stopped_at is None:
            self._stopped_at = now
        stopped_s = 0.0 if self._stopped_at is None else now - self._stopped_at
        found = self._found(stopped_s, silent_s)
        if found is not None and (self._trouble is None or self._trouble.cause != found.cause):
            self.counts[found.cause] = self.counts.get(found.cause, 0) + 1
        self._trouble = found

    def trouble(self) -> VerdictReport | None:
        """What the last look has found."""
        return self._trouble

    def _found(self, stopped_s: float, silent_s: float) -> VerdictReport | None:
        process = f"the engine's process (pid {self._pid})"
        if stopped_s >= STOPPED_AFTER_S:
            return _report("stopped", f"{process} is stopped by a signal", stopped_s)
        if silent_s >= self._silent_after_s:
            return _report("silent", f"{process} has said nothing for {silent_s:.0f} s: it hangs in a step", silent_s)
        return None


def _start_time_of(pid: int) -> int | None:
    with suppress(PeerDiedError):  # the end of its stream tells that it has ended
        return Party.of("the engine", pid).start_time
    return None


def _report(cause: str, paragraph: str, for_s: float) -> VerdictReport:
    since = utc_now() - datetime.timedelta(seconds=for_s)
    return VerdictReport(
        cause=cause, nodes=(os.uname().nodename,), paragraph=paragraph, since=since, for_s=round(for_s, 3)
    )
