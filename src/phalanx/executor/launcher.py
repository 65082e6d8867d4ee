"""Placing and starting workers. A launcher knows nothing of messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from phalanx.worker.spec import WorkerSpec


class Launcher(Protocol):
    """Starts one process for each rank and sees to it that none outlives the run."""

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Set the workers off; returns before they are ready. Raises StartError when they cannot be set off."""

    def exits(self) -> dict[int, str]:
        """Ranks that have ended so far and how, such as `killed by SIGKILL` or `exit code 1`. Never blocks.

        It may be known already of a process that has begun to end.
        """

    def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the workers to leave, then kill them. None is left when this returns.

        Raises DeadlineError naming a process that the kernel does not end.
        """


class Killable(Protocol):
    """Ranks, as soon as there may be any. For any thread."""

    def kill(self) -> None:
        """Have every rank's process killed, also one that is still to come; returns before they have ended."""
