"""What a rank notes of a group's collectives: each in its journal, and all of a step in a word for who compares ranks.

On a CPU a rank's weights go through its caches between two collectives, so that each function, each attribute and each
object that a note takes costs a wait for memory: several times what it takes in a loop. So there are two ways to note:
one for every case, and one for the case that pays for it (`_Direct`), which does the same in one function that has all
it needs at hand: a third of the time. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import (
    DONE_WORD,
    LAST_WORD,
    LAUNCHED_WORD,
    MAX_GROUPS,
    NUM_RECORDS,
    OPEN_STEP_WORD,
    RECORD_WORDS,
    RECORDS_AT,
    SEQUENCES_WORD,
    WORD_BYTES,
)
from phalanx.ledger.record import EPOCH_SHIFT, GROUP_SHIFT, KIND_SHIFT, PRIME, WORD, Kind, rolled
from phalanx.ledger.step_digests import BOARD_BYTES, COUNT, NUM_SLOTS, ROLLING, SLOT_WORDS, StepDigests, place_of


class Noted(Protocol):
    """A collective. `str` of it is what it is called."""

    @property
    def digest(self) -> int:
        """64 bits that differ where two collectives differ."""
        ...


class GroupNotes(Protocol):
    """For the use of one thread."""

    @property
    def issue(self) -> Callable[[Noted], None]:
        """The group's next collective begins."""
        ...

    @property
    def done(self) -> Callable[[], None]:
        """It is over."""
        ...

    def failed(self) -> None:
        """It has ended with an error, unless it is over. Raises none of its own, which would hide that."""
        ...

    @property
    def sequence(self) -> int:
        """Of the newest collective, from 1."""
        ...

    def explain(self, collective: Noted) -> None:
        """Before one like it is issued for the first time: have readers know what it is called."""
        ...

    def note_captured(self, place: int, collective: Noted) -> None:
        """A collective goes into a graph instead, as the so-many-th of its group there. It does not begin, nor end."""
        ...


def group_notes(index: int, journal: Journal | None, digests: StepDigests | None) -> GroupNotes:
    """Of the group with this index among the rank's, in what it keeps of the two."""
    assert 0 < index < MAX_GROUPS, index
    if journal is not None and journal.fence_stores is None:
        return _Direct(index, journal, digests)
    return _Plain(index, journal, digests)


class _Plain:
    """With or without a journal."""

    def __init__(self, index: int, journal: Journal | None, digests: StepDigests | None) -> None:
        self._index = index
        self._journal = journal
        self._digests = digests
        self._rolling = 0
        self._number = 0
        self.sequence = 0

    def issue(self, collective: Noted) -> None:
        self.sequence += 1
        digest = collective.digest
        if self._is_in_step():  # a method's own may differ: its caller hears of it, and the ranks go on
            self._rolling = rolled(self._rolling, digest)
            if self._digests is not None:
                self._digests.fold(self._index, self._rolling)
        if self._journal is not None:
            self._number = self._journal.issue(self._index, self.sequence, digest, self._rolling)

    def done(self) -> None:
        if self._journal is not None:
            self._journal.done(self._number)

    def failed(self) -> None:
        if self._journal is not None:
            self._journal.failed(self._number)

    def explain(self, collective: Noted) -> None:
        if self._journal is not None:
            self._journal.explain(collective.digest, collective.__str__)

    def note_captured(self, place: int, collective: Noted) -> None:
        if self._journal is not None:
            self._journal.note_captured(self._index, place, collective.digest)

    def _is_in_step(self) -> bool:
        if self._digests is not None:
            return self._digests.step > 0
        return self._journal is not None and self._journal.open_step > 0


class _Direct:
    """With a journal whose stores are seen in order."""

    issue: Callable[[Noted], None]
    done: Callable[[], None]

    def __init__(self, index: int, journal: Journal, digests: StepDigests | None) -> None:
        self._index = index
        self._journal = journal
        self._number: Callable[[], int]
        self._begin(digests.words if digests is not None else memoryview(bytearray(BOARD_BYTES)).cast("Q"))

    def _begin(self, board: memoryview) -> None:
        words, now_ns = self._journal.words, self._journal.now_ns
        mark_begun, mark_finished = self._journal.mark_begun, self._journal.mark_finished
        what = self._journal.epoch << EPOCH_SHIFT | self._index << GROUP_SHIFT | int(Kind.COLLECTIVE) << KIND_SHIFT
        first, sequence_at, of_group = RECORDS_AT // WORD_BYTES, SEQUENCES_WORD + self._index, place_of(self._index)
        sequence = words[sequence_at]
        rolling = number = 0
        at = first

        def issue(collective: Noted) -> None:
            nonlocal sequence, rolling, number, at
            digest = collective.digest
            step = words[OPEN_STEP_WORD]
            if step:
                # As `rolled` and `StepDigests.fold` do.
                rolling = ((rolling ^ digest) * PRIME) & WORD
                place = step % NUM_SLOTS * SLOT_WORDS + of_group
                board[place] = rolling & ROLLING | board[place] + 1 & COUNT
            # As `Journal.issue` does.
            sequence += 1
            words[sequence_at] = sequence
            number = words[LAST_WORD] + 1
            at = first + number % NUM_RECORDS * RECORD_WORDS
            words[at] = 0
            words[at + 1] = what
            words[at + 2] = step
            words[at + 3] = sequence
            words[at + 4] = digest
            words[at + 5] = rolling
            words[at + 6] = now_ns()
            words[at + 7] = 0
            words[at] = words[LAST_WORD] = number
            if mark_begun is not None:
                mark_begun(number)

        def done() -> None:
            # As `Journal.done` does.
            if words[at] == number:
                words[at + DONE_WORD] = now_ns()
                if mark_finished is not None and number > words[LAUNCHED_WORD]:
                    mark_finished(number)
                    words[LAUNCHED_WORD] = number

        self.issue, self.done, self._number = issue, done, lambda: number

    @property
    def sequence(self) -> int:
        return int(self._journal.words[SEQUENCES_WORD + self._index])

    def failed(self) -> None:
        self._journal.failed(self._number())

    def explain(self, collective: Noted) -> None:
        self._journal.explain(collective.digest, collective.__str__)

    def note_captured(self, place: int, collective: Noted) -> None:
        self._journal.note_captured(self._index, place, collective.digest)
