"""A message from a process to one that it has forked before it knew what to say."""

from __future__ import annotations

import os
from contextlib import ExitStack


class Letter:
    """What a process is told once, of any length. Whoever writes it does not wait for who reads it."""

    def __init__(self) -> None:
        """Raises OSError."""
        with ExitStack() as undo:
            self._paper = os.memfd_create("phalanx letter")
            undo.callback(os.close, self._paper)
            self._arrival, self._arrives = os.pipe()
            undo.pop_all()

    def write(self, text: bytes) -> None:
        with os.fdopen(os.dup(self._paper), "wb") as paper:
            paper.write(text)
        os.write(self._arrives, b"!")

    def read(self) -> bytes:
        """Blocks until it is written."""
        os.read(self._arrival, 1)
        return os.pread(self._paper, os.fstat(self._paper).st_size, 0)

    def close(self) -> None:
        for descriptor in (self._paper, self._arrival, self._arrives):
            os.close(descriptor)
