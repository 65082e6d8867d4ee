"""The log's way out of a process: what takes nothing any more, such as a pipe that nobody reads, holds up nobody."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
from typing import TextIO, cast

PATIENCE_S = 0.05
"""With who reads slowly: once, and then with each line as soon as that takes something again."""

_AT_ONCE = select.PIPE_BUF
"""As much as a pipe takes for sure that takes anything."""


class LogStream(io.TextIOBase):
    """Text that is not taken in time is lost, and it is said how many lines were. For one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        """The descriptor stays the caller's."""
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._num_lost = 0

    def write(self, text: str) -> int:
        """Blocks for PATIENCE_S at most. Raises nothing: of an error of the log there is nobody to tell."""
        lost = f"({self._num_lost} lines of the log were lost: nobody took them)\n" if self._num_lost else ""
        if self._put(lost + text):
            self._num_lost = 0
        else:
            self._num_lost += 1
        return len(text)

    def _put(self, text: str) -> bool:
        left = memoryview(text.encode(errors="backslashreplace"))
        try:
            while left:
                if not self._poll.poll(0 if self._num_lost else PATIENCE_S * 1000):
                    return False
                left = left[os.write(self._descriptor, left[:_AT_ONCE]) :]
        except OSError:  # a full disk, or a reader that is gone
            return False
        return True


def log_to_stderr(line: str, *, level: int) -> None:
    """Have this process's log there, if there is such a thing. `line`: how one looks, as logging has it."""
    try:
        stream: TextIO | None = cast(TextIO, LogStream(sys.stderr.fileno())) if sys.stderr is not None else None
    except io.UnsupportedOperation:  # something that a test, or a program of the user's, has put there
        stream = sys.stderr
    handler = logging.StreamHandler(stream) if stream is not None else logging.NullHandler()
    logging.basicConfig(handlers=[handler], level=level, format=line)
