"""Memory in which one process keeps the newest of what it has to say, and others read it at any time.

Nobody waits for anybody, and a reader never sees half of something.

    words    the content's number, then those that the writer uses as it likes; then two places
    place    a length, the content; content n is at n modulo 2, so the newest is never written over
"""

from __future__ import annotations

from phalanx.transport.futex import new_fence

WORD_BYTES = 8
_NUMBER = 0
_PLACES = 64
_MOST_TRIES = 10


def bytes_for(most: int) -> int:
    """How much memory it takes to hold contents of so many bytes."""
    return _PLACES + 2 * (WORD_BYTES + _rounded_up(most))


class NewestWriter:
    """For one thread of one process."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: zeroed, as much as `bytes_for` says."""
        self._memory = memory
        self._words = memory.cast("Q")
        self._fence = new_fence()
        self.room = _place_bytes(memory) - WORD_BYTES

    def put(self, content: bytes) -> None:
        """`room` bytes at most."""
        assert len(content) <= self.room, len(content)
        number = self._words[_NUMBER] + 1
        at = _place(self._memory, number)
        self._words[at // WORD_BYTES] = len(content)
        self._memory[at + WORD_BYTES :][: len(content)] = content
        self._fence()
        self._words[_NUMBER] = number


def read_newest(memory: memoryview) -> bytes | None:
    """What was put there last; None if nothing was. Never blocks; `memory` may be written to meanwhile."""
    words, fence = memory.cast("Q"), new_fence()
    for _ in range(_MOST_TRIES):
        number = words[_NUMBER]
        if not number:
            return None
        fence()
        at = _place(memory, number)
        size = min(words[at // WORD_BYTES], _place_bytes(memory) - WORD_BYTES)
        content = bytes(memory[at + WORD_BYTES :][:size])
        fence()
        if words[_NUMBER] == number:
            return content
    return None


def _place_bytes(memory: memoryview) -> int:
    return (len(memory) - _PLACES) // 2 // WORD_BYTES * WORD_BYTES


def _place(memory: memoryview, number: int) -> int:
    return _PLACES + number % 2 * _place_bytes(memory)


def _rounded_up(num_bytes: int) -> int:
    return -(-num_bytes // WORD_BYTES) * WORD_BYTES
