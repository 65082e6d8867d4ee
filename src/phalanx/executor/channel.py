"""How calls reach workers and replies come back. A channel knows nothing of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from phalanx.protocol.worker import Call, WorkerMessage


class Channel(Protocol):
    """One sender of calls to all workers; one receiver of what they say."""

    def put(self, message: Call, *, deadline_s: float) -> None:
        """Send to every worker. Raises DeadlineError or PeerDiedError naming the rank that does not take it."""

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        """The next message of any rank, with its rank; None when none came in time.

        Raises PeerDiedError naming the rank or node that is gone, DeadlineError naming the node that is silent,
        FrameError for what is no message.
        """

    def forget(self, reader: int) -> None:
        """Go on without this rank, which has said its last: its end raises no PeerDiedError."""

    def close(self) -> None:
        """Let go of the channel's memory. Nothing can be sent afterwards."""
