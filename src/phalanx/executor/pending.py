"""A call that is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from phalanx.protocol.worker import ReplyBody

T = TypeVar("T", covariant=True)


class Pending(Generic[T]):
    """The answer to come of one call. Several may be under way; they resolve in the order of the calls.

    Belongs to the thread that made the call.
    """

    def __init__(
        self,
        awaited: str,
        ranks: Sequence[int],
        deadline_s: float,
        pump: Callable[[Pending[Any], bool], None],
        convert: Callable[[Sequence[ReplyBody]], T],
    ) -> None:
        self.awaited = awaited
        self.missing = set(ranks)
        self.deadline_s = deadline_s
        self.began_at = time.monotonic()
        """When its time began to run: now, or when the call before it was answered."""
        self._replies: dict[int, ReplyBody] = {}
        self._pump = pump
        self._convert = convert

    def done(self) -> bool:
        """Whether `result` would return at once. Takes in what has come; raises what `result` would."""
        if self.missing:
            self._pump(self, False)
        return not self.missing

    def result(self) -> T:
        """Block until every awaited rank has answered, at most to the call's deadline.

        Raises WorkerError when a rank failed, PeerDiedError when one died, DeadlineError when one gave no answer.
        """
        while self.missing:
            self._pump(self, True)
        return self._convert([self._replies[rank] for rank in sorted(self._replies)])

    def is_late(self) -> bool:
        """Whether it has not been answered in its time."""
        return bool(self.missing) and time.monotonic() - self.began_at > self.deadline_s

    @property
    def awaited_ranks(self) -> str:
        """The ranks that have not answered, in words."""
        return ", ".join(f"rank {rank}" for rank in sorted(self.missing))

    def resolve(self, rank: int, body: ReplyBody) -> None:
        """Take in one rank's answer."""
        assert rank in self.missing, f"rank {rank} answered {self.awaited} twice or unasked"
        self.missing.discard(rank)
        self._replies[rank] = body
