"""One fork server for many runs, one after the other: torch is imported once, a run then starts in a moment."""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.executor.local import LocalLauncher, LocalLaunchers


class WarmStart:
    """Gives every run a launcher on the same fork server, and knows the last one. A context manager."""

    def __init__(self) -> None:
        self._launchers = LocalLaunchers()
        self._last: LocalLauncher | None = None

    def launcher(self, environment: Mapping[str, str]) -> LocalLauncher:
        """For `start_executor`."""
        self._last = self._launchers.launcher(environment)
        return self._last

    def pid(self, rank: int) -> int | None:
        """Of a rank that has been forked and has not ended."""
        if self._last is None or rank in self._last.exits():
            return None
        return self._last.pids().get(rank)

    def kill(self) -> None:
        """Kill all ranks."""
        if self._last is not None:
            self._last.kill()

    def __enter__(self) -> WarmStart:
        return self

    def __exit__(self, *_: object) -> None:
        self._launchers.close()
