"""What a rank has issued in each of its groups in a step, in one word a group: members of a group must agree.

So ranks that have diverged are found though nobody waits. A word is 48 bits of a digest, of all that the group has
issued in steps so far, above a count of 16 bits, of this step's alone: so it is read and written as a whole, and tells
of two that differ which is further on.

A rank's memory is a ring of NUM_SLOTS slots, of SLOT_WORDS words each:

    0     the step; 0 while the slot is being prepared
    1     the step again, once all that is of it has been issued
    2...  a word for each group, by its index in the rank's records

It may be shared with the process that compares, which may read at any time. That one reads no step whose slot could be
another step's by then. No torch here.
"""

from __future__ import annotations

from typing import NamedTuple

from phalanx.ledger.journal_layout import MAX_GROUPS
from phalanx.transport.futex import new_fence

NUM_SLOTS = 128
"""More than twice the steps that can be under way: one for each stage of a pipeline."""
_WORDS = 2
SLOT_WORDS = _WORDS + MAX_GROUPS
_WORD_BYTES = 8
BOARD_BYTES = NUM_SLOTS * SLOT_WORDS * _WORD_BYTES
"""Of one rank."""

COUNT, ROLLING = 0xFFFF, 0xFFFFFFFFFFFF0000
"""The bits of a group's word that count its collectives in the step, and those of their digest."""

_NOTHING = bytes(SLOT_WORDS * _WORD_BYTES)


def place_of(group: int) -> int:
    """Where the word of a group is, by its index, in a slot."""
    return _WORDS + group


class Issued(NamedTuple):
    """What a rank has issued in a step, as far as it has come."""

    step: int
    has_left: bool
    """Whether that is all."""
    words: tuple[int, ...]
    """By the group's index in the rank's records; the first is of no group."""


class StepDigests:
    """The end that writes. For the use of one thread."""

    def __init__(self, memory: memoryview, num_groups: int) -> None:
        """`memory`: BOARD_BYTES, zeroed. `num_groups`: of the rank, which number from 1 on."""
        assert num_groups < MAX_GROUPS, num_groups
        self.words = memory[:BOARD_BYTES].cast("Q")
        self.step = 0
        """That what is issued now is of; 0 if it is of none."""
        self._bytes = memory[:BOARD_BYTES]
        self._num_words = 1 + num_groups
        self._fence = new_fence()

    def begin(self, step: int) -> None:
        """What is issued from now on, until `leave`, is of this step, which is no other's number, and not 0."""
        at = step % NUM_SLOTS * SLOT_WORDS
        words, fence = self.words, self._fence
        words[at] = 0
        fence()
        num_bytes = (_WORDS + self._num_words) * _WORD_BYTES
        self._bytes[at * _WORD_BYTES :][:num_bytes] = _NOTHING[:num_bytes]
        fence()
        words[at] = self.step = step

    def fold(self, group: int, rolling: int) -> None:
        """The next collective of a group in the step. `rolling`: the digest of all that were in steps, this one too."""
        at, words = self.step % NUM_SLOTS * SLOT_WORDS + place_of(group), self.words
        words[at] = rolling & ROLLING | words[at] + 1 & COUNT

    def leave(self) -> bytes:
        """All of the step has been issued. Returns it for `told`."""
        at, words = self.step % NUM_SLOTS * SLOT_WORDS, self.words
        self.step = 0
        self._fence()
        words[at + 1] = words[at]
        return self._bytes[(at + 1) * _WORD_BYTES :][: (1 + self._num_words) * _WORD_BYTES].tobytes()


def told(column: bytes) -> Issued:
    """What `StepDigests.leave` returned, in another process of the same kind of machine."""
    step, *words = memoryview(column).cast("Q").tolist()
    return Issued(step, True, tuple(words))


class StepDigestReader:
    """The end that reads the memory of one rank. For the use of one thread."""

    def __init__(self, memory: memoryview, num_groups: int) -> None:
        self._words = memory[:BOARD_BYTES].cast("Q")
        self._num_words = 1 + num_groups
        self._fence = new_fence()

    def read(self, step: int) -> Issued | None:
        """What the rank has issued in a step; None if it has not begun it. Never blocks."""
        at, words = step % NUM_SLOTS * SLOT_WORDS, self._words
        has_left = words[at + 1] == step
        if not has_left and words[at] != step:
            return None
        self._fence()  # what it has issued grows until it is said that it has left
        return Issued(step, has_left, tuple(words[at + _WORDS : at + _WORDS + self._num_words].tolist()))


def count_of(word: int) -> int:
    """How many collectives a word stands for."""
    return word & COUNT
