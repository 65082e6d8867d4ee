"""Where the watcher writes what stands: memory of the engine's process that anybody of its user can read at any time.

So the server and `phalanx doctor` know it also while the engine's process is stopped or hangs. Notices are in msgpack
(newest.py); the first word that is the writer's own says when it has looked last.
"""

from __future__ import annotations

import msgspec

from phalanx.ledger.newest import NewestWriter, read_newest
from phalanx.ledger.verdict import Verdict

BOARD_BYTES = 2**17
_LOOKED = 1


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """What stands on the board."""

    num_ranks: int = 0
    """That are watched."""
    verdict: Verdict | None = None
    since_ns: int = 0
    """Of the monotonic clock."""
    counts: dict[str, int] = {}
    """How many verdicts there have been, by cause."""
    looked_ns: int = 0
    """When the watcher looked last; 0 if it never did. Of the monotonic clock."""
    num_restarts: int = 0
    """How often another watcher has taken the place of one that had ended."""


class BoardWriter:
    """For one thread of one process, which may take the place of one that has ended: what stood there still stands."""

    def __init__(
        self, memory: memoryview, num_ranks: int, standing: Verdict | None = None, num_restarts: int = 0
    ) -> None:
        """`memory`: BOARD_BYTES, zeroed, or as another writer has left it, which need not have come to post anything.
        `standing`: what that has posted last, if it still stands."""
        before = read_board(memory)
        self._newest = NewestWriter(memory)
        self._words = memory.cast("Q")
        self._num_ranks = num_ranks
        self._counts = dict(before.counts) if before is not None else {}
        self._num_restarts = num_restarts
        self.since_ns = before.since_ns if before is not None and standing is not None else 0
        """Since when what stands has."""
        self._standing = standing
        self._post()

    def looked(self, now_ns: int) -> None:
        """All ranks were looked at."""
        self._words[_LOOKED] = now_ns

    def post(self, verdict: Verdict | None, since_ns: int) -> None:
        """Another verdict stands, since then, or none any more."""
        if verdict is not None:
            self._counts[verdict.cause] = self._counts.get(verdict.cause, 0) + 1
        self.since_ns = since_ns
        self._standing = verdict
        self._post()

    def restarted(self, num_restarts: int) -> None:
        """So often another watcher has taken the place of one that had ended, on whatever node."""
        if num_restarts != self._num_restarts:
            self._num_restarts = num_restarts
            self._post()

    def _post(self) -> None:
        notice = Notice(
            num_ranks=self._num_ranks,
            verdict=self._standing,
            since_ns=self.since_ns,
            counts=self._counts,
            num_restarts=self._num_restarts,
        )
        self._newest.put(msgspec.msgpack.encode(notice))


def read_board(memory: memoryview) -> Notice | None:
    """What stands there; None before the watcher has begun. Never blocks; `memory` may be written to meanwhile."""
    content = read_newest(memory)
    if content is None:
        return None
    return msgspec.structs.replace(msgspec.msgpack.decode(content, type=Notice), looked_ns=memory.cast("Q")[_LOOKED])
