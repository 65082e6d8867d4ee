"""One fork server for many runs, one after the other: torch is imported once, a run then starts in a moment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from phalanx.errors import DeadlineError
from phalanx.executor.local import LocalLauncher

END_DEADLINE_S = 10.0
KILL_AGAIN_S = 0.05
"""A rank may not even have been forked when the others were killed."""


class WarmLauncher(LocalLauncher):
    """A LocalLauncher that outlives its ranks: `close` ends them, and `end` what is left."""

    @property
    def has_ended(self) -> bool:
        """Whether it can start no more ranks."""
        with self._changed:
            return self._server_exit is not None

    def close(self, timeout_s: float) -> None:
        """End all ranks. Raises DeadlineError if the kernel cannot."""
        expires_at = time.monotonic() + timeout_s + END_DEADLINE_S
        self.await_exits(timeout_s)
        self.kill()
        while not self.await_exits(KILL_AGAIN_S):
            if time.monotonic() > expires_at:
                raise DeadlineError("the end after SIGKILL", "ranks", END_DEADLINE_S)
            self.kill()

    def end(self) -> None:
        """End the fork server, too."""
        super().close(0.0)


class WarmStart:
    """Gives every run the same launcher. The first one's environment is that of all."""

    def __init__(self) -> None:
        self._launcher: WarmLauncher | None = None

    def launcher(self, environment: Mapping[str, str]) -> LocalLauncher:
        """For `start_executor`."""
        if self._launcher is None:
            self._launcher = WarmLauncher(environment)
        return self._launcher

    def pid(self, rank: int) -> int | None:
        """Of a rank that has been forked and has not ended."""
        if self._launcher is None or rank in self._launcher.exits():
            return None
        return self._launcher.pids().get(rank)

    def kill(self) -> None:
        """Kill all ranks."""
        if self._launcher is not None:
            self._launcher.kill()

    def __enter__(self) -> WarmStart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._launcher is not None:
            self._launcher.end()
