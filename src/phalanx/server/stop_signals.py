"""SIGINT and SIGTERM: the first asks for a graceful stop, the second for an end at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignals:
    """Two events in the order in which they happen."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in the running loop, which must be the main thread's."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.note)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def note(self) -> None:
        """One more signal has come."""
        (self.second if self.first.is_set() else self.first).set()
