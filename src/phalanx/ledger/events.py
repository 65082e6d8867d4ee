"""What the ledger finds as JSON lines, for programs that collect logs: a verdict when it is there, and its end."""

from __future__ import annotations

import datetime
import errno
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


class EventLines:
    """A file that several processes append to: one write a line, so that lines do not mix."""

    def __init__(self, path: str) -> None:
        """Raises OSError if it cannot be written. So does a pipe that nobody reads: to open it would else wait."""
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        self._is_torn = False

    def write(self, event: Event) -> None:
        """Raises OSError if it was not written, or only in part. Waits for a disk, but never for who reads a pipe."""
        line = msgspec.json.encode(event) + b"\n"
        if self._is_torn:
            line = b"\n" + line
        num_taken = os.write(self._fd, line)
        self._is_torn = num_taken < len(line)
        if self._is_torn:
            raise BlockingIOError(errno.EAGAIN, "nobody takes it")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> EventLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventsFile:
    """Events written in a thread: the watcher does not wait for a disk."""

    def __init__(self, path: str) -> None:
        """Raises OSError if it cannot be written."""
        self._path = path
        self._lines = EventLines(path)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="phalanx-events", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        """Never blocks, never raises: the log has it too."""
        self._events.put(event)

    def close(self) -> None:
        """Wait for what is being written, for DEADLINE_S at most."""
        self._events.put(None)
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            log.warning("%s: an event was not written within %g s", self._path, DEADLINE_S)

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._lines.write(event)
            except OSError as error:  # a full disk
                log.warning("%s: an event was not written: %s", self._path, error.strerror)
        self._lines.close()

    def __enter__(self) -> EventsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
