"""The log's way out of a process: what takes nothing any more, such as a pipe that nobody reads, holds up nobody."""

from __future__ import annotations

import io
import logging
import os
import select
import stat
import sys
import time
from contextlib import suppress
from typing import TextIO, cast

PATIENCE_S = 0.05
"""With who reads slowly: once, and then with each line as soon as that takes something again."""

_AT_ONCE = select.PIPE_BUF
"""As much as a pipe takes for sure that takes anything."""


class LogStream(io.TextIOBase):
    """Text that is not taken in time is lost, and it is said how many lines were. For one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        """The descriptor stays the caller's, and blocks as it did: other processes have it, too."""
        self._own = _reopened(descriptor)
        self._descriptor = descriptor if self._own is None else self._own
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._num_lost = 0
        self._is_torn = False

    def write(self, text: str) -> int:
        """Blocks for PATIENCE_S at most. Raises nothing: of an error of the log there is nobody to tell."""
        lost = f"({self._num_lost} lines of the log were lost: nobody took them)\n" if self._num_lost else ""
        if self._put("\n" * self._is_torn + lost + text):
            self._num_lost = 0
        else:
            self._num_lost += 1
        return len(text)

    def close(self) -> None:
        """May be called more than once."""
        if self._own is not None:
            os.close(self._own)
            self._own = None
        super().close()

    def _put(self, text: str) -> bool:
        encoded = memoryview(text.encode(errors="backslashreplace"))
        left = self._what_is_not_taken_of(encoded)
        if len(left) < len(encoded):
            self._is_torn = len(left) > 0
        return not left

    def _what_is_not_taken_of(self, left: memoryview) -> memoryview:
        patience_s = 0.0 if self._num_lost else PATIENCE_S
        expires_at = time.monotonic() + patience_s
        while left and self._poll.poll(max(0.0, expires_at - time.monotonic()) * 1000):
            try:
                left = left[os.write(self._descriptor, left[:_AT_ONCE]) :]
                expires_at = time.monotonic() + patience_s
            except BlockingIOError:  # another process was quicker
                if time.monotonic() >= expires_at:
                    break
            except OSError:  # a full disk, or a reader that is gone
                break
        return left


def _reopened(descriptor: int) -> int | None:
    """The same pipe or terminal, not to block on. None for anything else, or if that cannot be had.

    Of a terminal a poll says only that it takes some of a line. O_NONBLOCK on the descriptor itself would be for all
    processes that have inherited it, and a file opened again would begin at its beginning.
    """
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return None


def log_to_stderr(line: str, *, level: int) -> None:
    """Have this process's log there, if there is such a thing. `line`: how one looks, as logging has it."""
    logging.basicConfig(handlers=[_to_stderr()], level=level, format=line)


def log_to_stderr_beside(line: str, *, level: int) -> None:
    """The same of a process that runs a user's code, whose `logging` is its own: Phalanx's lines stay as they are,
    whatever that sets up, and what it does not is logged like them."""
    handler = _to_stderr()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(line))
    logging.lastResort = handler
    logging.getLogger().setLevel(level)
    ours = logging.getLogger("phalanx")
    ours.addHandler(handler)
    ours.propagate = False


def _to_stderr() -> logging.Handler:
    try:
        stream: TextIO | None = cast(TextIO, LogStream(sys.stderr.fileno())) if sys.stderr is not None else None
    except io.UnsupportedOperation:  # something that a test, or a program of the user's, has put there
        stream = sys.stderr
    return logging.StreamHandler(stream) if stream is not None else logging.NullHandler()
