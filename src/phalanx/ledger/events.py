"""What the ledger finds as JSON lines, for programs that collect logs: a verdict when it is there, and its end."""

from __future__ import annotations

import datetime
import logging
import os
import queue
import threading
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from phalanx.ledger.report import paragraph
from phalanx.ledger.verdict import Verdict

DEADLINE_S = 1.0

log = logging.getLogger("phalanx.ledger")


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line: of an engine, or of a command that `phalanx watch` runs."""

    time: datetime.datetime
    """UTC."""
    level: Literal["info", "warning", "error"]
    """error: the run is over. warning: who is to blame may still come."""
    event: Literal["verdict", "verdict_over"]
    message: str
    """In words, the culprit first."""
    model: str | UnsetType = UNSET
    engine_pid: int | UnsetType = UNSET
    command_pid: int | UnsetType = UNSET
    for_s: float
    """How long it has been so already, or was in all."""
    verdict: Verdict


def event_of(
    verdict: Verdict, *, is_over: bool, since_ns: int, now_ns: int, now: datetime.datetime, model: str, engine_pid: int
) -> Event:
    """An engine's verdict that stands from now on, or no more. Times as in report.py."""
    for_s = round(max(now_ns - since_ns, 0) / 1e9, 3)
    said = paragraph(verdict)
    return Event(
        time=now,
        level="info" if is_over else _level(verdict),
        event="verdict_over" if is_over else "verdict",
        message=f"over after {for_s:.1f} s: {said}" if is_over else said,
        model=model,
        engine_pid=engine_pid,
        for_s=for_s,
        verdict=verdict,
    )


def event_of_command(verdict: Verdict, now: datetime.datetime, command_pid: int) -> Event:
    """A verdict on the ranks of a command."""
    return Event(
        time=now,
        level=_level(verdict),
        event="verdict",
        message=paragraph(verdict),
        command_pid=command_pid,
        for_s=round(verdict.waited_s, 3),
        verdict=verdict,
    )


def _level(verdict: Verdict) -> Literal["warning", "error"]:
    return "error" if verdict.is_final else "warning"


class EventsFile:
    """Appends to a file that several engines may write to, in a thread: the watcher does not wait for a disk."""

    def __init__(self, path: str) -> None:
        """Raises OSError if it cannot be written."""
        self._path = path
        self._fd = open_events(path)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="phalanx-events", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """One write a line: lines of several engines do not mix. Never blocks, never raises: the log has it too."""
        self._lines.put(msgspec.json.encode(event) + b"\n")

    def close(self) -> None:
        """Wait for what is being written, for DEADLINE_S at most."""
        self._lines.put(None)
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            log.warning("%s: an event was not written within %g s", self._path, DEADLINE_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                os.write(self._fd, line)
            except OSError as error:  # a full disk
                log.warning("%s: an event was not written: %s", self._path, error)
        os.close(self._fd)

    def __enter__(self) -> EventsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_events(path: str) -> int:
    """A descriptor to append to, of a file that is made if it is not there. Raises OSError.

    Of a pipe that nobody reads, too: to open it would else wait for somebody who does.
    """
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
