"""Where the watcher writes what stands: memory of the engine's process that anybody of its user can read at any time.

So the server and `phalanx doctor` know it also while the engine's process is stopped or hangs. One writes, and waits
for nobody; readers never block.

    words    the newest notice's number, when the writer looked last; then two places for notices
    place    a length, the notice in msgpack; notice n is at n modulo 2, so the newest is never written over
"""

from __future__ import annotations

import msgspec

from phalanx.ledger.verdict import Verdict
from phalanx.transport.futex import new_fence

BOARD_BYTES = 2**17
_WORD_BYTES = 8
_NUMBER, _LOOKED = 0, 1
_PLACES = 64
_PLACE_BYTES = (BOARD_BYTES - _PLACES) // 2
_MOST_TRIES = 10


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


class BoardWriter:
    """For one thread of one process."""

    def __init__(self, memory: memoryview, num_ranks: int) -> None:
        """`memory`: BOARD_BYTES, zeroed."""
        self._memory = memory
        self._words = memory.cast("Q")
        self._fence = new_fence()
        self._num_ranks = num_ranks
        self._counts: dict[str, int] = {}
        self._post(Notice(num_ranks=num_ranks))

    def looked(self, now_ns: int) -> None:
        """All ranks were looked at."""
        self._words[_LOOKED] = now_ns

    def post(self, verdict: Verdict | None, since_ns: int) -> None:
        """Another verdict stands, since then, or none any more."""
        if verdict is not None:
            self._counts[verdict.cause] = self._counts.get(verdict.cause, 0) + 1
        self._post(Notice(num_ranks=self._num_ranks, verdict=verdict, since_ns=since_ns, counts=self._counts))

    def _post(self, notice: Notice) -> None:
        content = msgspec.msgpack.encode(notice)
        assert len(content) <= _PLACE_BYTES - _WORD_BYTES, len(content)
        number = self._words[_NUMBER] + 1
        at = _place(number)
        self._words[at // _WORD_BYTES] = len(content)
        self._memory[at + _WORD_BYTES :][: len(content)] = content
        self._fence()
        self._words[_NUMBER] = number


def read_board(memory: memoryview) -> Notice | None:
    """What stands there; None before the watcher has begun. Never blocks; `memory` may be written to meanwhile."""
    words, fence = memory.cast("Q"), new_fence()
    for _ in range(_MOST_TRIES):
        number = words[_NUMBER]
        if not number:
            return None
        fence()
        at = _place(number)
        size = min(words[at // _WORD_BYTES], _PLACE_BYTES - _WORD_BYTES)
        content = bytes(memory[at + _WORD_BYTES :][:size])
        fence()
        if words[_NUMBER] == number:
            notice = msgspec.msgpack.decode(content, type=Notice)
            return msgspec.structs.replace(notice, looked_ns=words[_LOOKED])
    return None


def _place(number: int) -> int:
    return _PLACES + number % 2 * _PLACE_BYTES
