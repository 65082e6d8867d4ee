"""One rank, from look to look: what it does, for how long it has noted nothing, what it has computed meanwhile."""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from phalanx.ledger.journal_reader import Entries, Reader
from phalanx.ledger.look import RankLook
from phalanx.ledger.pulse import Asker, ThreadTimes, starved_ns, threads_times
from phalanx.ledger.watch_order import WatchedRank
from phalanx.transport.liveness import state_of

STILL_S = 0.01
"""A rank in a step that has noted nothing for so long is looked at: as long as all is well, it does so all the time."""

GLANCE_RECORDS = 16
"""Of each rank, as long as nothing is suspicious: enough for ranks that are a few collectives apart to overlap."""

GLANCE_WAIT_S = 0.2
"""A rank that has waited for less is not suspicious."""

MAY_END = ("not begun", "starting", "leaving")
"""Phases in which a rank that ends has said so, or says why by another way."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_NS = 1e9


class Watched:
    """One rank, from look to look."""

    def __init__(self, order: WatchedRank, journal: memoryview) -> None:
        self.order = order
        self.reader = Reader(journal)
        self._asker = Asker(journal)
        self._entries: Entries | None = None
        self._moved = (0, 0)
        self._still: _Still | None = None

    def passes(self, now_ns: int) -> Literal["goes on", "rests", "stands"]:
        """What it does, without a look. goes on: it notes something all the time. rests: it has been idle since it was
        looked at."""
        if self._is_ending():
            return "stands"
        if self.reader.is_idle:
            return "rests" if self.reader.moved == self._moved else "goes on"
        return "goes on" if now_ns - self.reader.noted_ns < STILL_S * _NS else "stands"

    def _is_ending(self) -> bool:
        """A process with a GPU is long about its end, and nobody is woken before that is over."""
        known = self._entries
        return known is not None and known.device is not None and process_of(known) in ("gone", "ended")

    def look(self, now_ns: int, most_records: int) -> RankLook | None:
        """None if the rank has not begun."""
        moved, self._moved = self._moved, self.reader.moved
        has_moved = moved != self._moved
        entries = self._read(most_records, has_moved)
        if not entries.pid:
            return None
        process = process_of(entries)
        if process == "gone":  # it may have said that it leaves after it was read, and before it was looked for
            entries = self.reader.read(most_records)
            process = process_of(entries)
        still = self._note_still(entries, now_ns, has_moved, is_whole=most_records > GLANCE_RECORDS)
        cpu_s, starved_s = still.until(entries, now_ns) if still is not None else (0.0, 0.0)
        return RankLook(
            rank=self.order.rank,
            node=self.order.node,
            groups=self.order.groups,
            process=process,
            entries=entries,
            held_s=self._asker.held_s(entries, now_ns) if process == "running" else 0.0,
            still_s=(now_ns - still.since_ns) / _NS if still is not None else 0.0,
            cpu_s=cpu_s,
            starved_s=starved_s,
        )

    def _read(self, most_records: int, has_moved: bool) -> Entries:
        """What was read before will do for a rank that is idle and has been."""
        known = self._entries
        if known is None or has_moved or known.phase != "idle" or most_records > GLANCE_RECORDS:
            known = self._entries = self.reader.read(most_records)
        return known

    def _note_still(self, entries: Entries, now_ns: int, has_moved: bool, *, is_whole: bool) -> _Still | None:
        """From when on it has been seen to note nothing; while it is idle only as long as something is suspicious."""
        is_of_interest = is_whole or entries.phase != "idle"
        if has_moved:
            self._still = None
        elif self._still is None and is_of_interest:
            self._still = _Still(now_ns, _cpu_s(entries))
        return self._still if is_of_interest else None


class _Still(msgspec.Struct):
    """A rank that notes nothing."""

    since_ns: int
    cpu_s: float
    """That it had computed by then."""
    threads: dict[int, ThreadTimes] | None = None
    """From `threads_ns` on. There may be hundreds, which nobody looks at for a step that takes a moment."""
    threads_ns: int = 0

    def until(self, entries: Entries, now_ns: int) -> tuple[float, float]:
        """What the rank has computed since, and for how long one of its threads has waited for a core."""
        if now_ns <= self.since_ns:
            return 0.0, 0.0
        starved_s = 0.0
        if self.threads is not None:
            starved_s = starved_ns(entries, self.threads, now_ns - self.threads_ns) / _NS
        elif now_ns - self.since_ns >= GLANCE_WAIT_S * _NS:
            self.threads, self.threads_ns = threads_times(entries.pid), now_ns
        return max(_cpu_s(entries) - self.cpu_s, 0.0), starved_s


def process_of(entries: Entries) -> Literal["running", "stopped", "gone", "ended"]:
    state = state_of(entries.pid, entries.start_time)
    if state is None:
        return "gone" if entries.phase not in MAY_END else "ended"
    return "stopped" if state in "Tt" else "running"


def _cpu_s(entries: Entries) -> float:
    """What a rank's process has computed so far."""
    try:
        with open(f"/proc/{entries.pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return 0.0
    user, system = stat[stat.rindex(b")") + 2 :].split()[11:13]
    return (int(user) + int(system)) * _TICK_S
