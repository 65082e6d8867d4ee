"""A rank's journal: a ring of records in memory that another process holds too, so that it outlives the rank.

The rank writes and waits for nobody. Whoever reads does so without its help: while it computes, is stopped, holds the
GIL, or is dead.

It is laid out as journal_layout.py says.

Ordering: a record's number is zeroed before the rest is written and written after it, and others see that in this order
(where it takes a fence, there is one after each); a reader takes what it copied only if the number was right before and
after. No torch here.

Where collectives are only given to a device, it is the device that writes how far it is, into two words of the header.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from phalanx.ledger.journal_layout import (
    DECISIONS_WORD,
    DONE_WORD,
    HAS_DEVICE_WORD,
    ISSUED_WORD,
    JOINING_WORD,
    JOURNAL_BYTES,
    LAST_WORD,
    LAUNCHED_WORD,
    MAX_GROUPS,
    MOST_TEXT_BYTES,
    NUM_DECISIONS,
    NUM_RECORDS,
    NUM_TEXTS,
    NUM_TEXTS_WORD,
    OPEN_STEP_WORD,
    OUTSIDE,
    OUTSIDE_GROUP_SHIFT,
    OUTSIDE_SINCE_WORD,
    OUTSIDE_WORD,
    PHASE_SINCE_WORD,
    PHASE_WORD,
    PHASES,
    PID_WORD,
    RECORDS_AT,
    SEQUENCES_WORD,
    STACKS_WORD,
    START_TIME_WORD,
    STEP_WORD,
    TEXT_BYTES,
    TEXTS_AT,
    WORD_BYTES,
)
from phalanx.ledger.record import (
    KIND_AT,
    LAYOUT,
    RECORD_BYTES,
    Kind,
    PlanSize,
)
from phalanx.transport.futex import STORES_ARE_SEEN_IN_ORDER, new_fence
from phalanx.transport.liveness import Party

_COLLECTIVE, _BEGUN_STEP, _CAPTURED = int(Kind.COLLECTIVE), int(Kind.STEP), int(Kind.CAPTURED)
_pack = LAYOUT.pack_into

Mark = Callable[[int], None]
"""Has the device write a number into a word of the header, when it has come so far in what it was given."""


def prepare_journal(memory: memoryview) -> None:
    """For who makes a journal, before the rank's process can be there: it is starting from now on."""
    words = memory[:JOURNAL_BYTES].cast("Q")
    words[PHASE_SINCE_WORD] = time.monotonic_ns()
    words[PHASE_WORD] = PHASES.index("starting")


def note_process(memory: memoryview, pid: int, start_time: int) -> None:
    """For who knows the rank's process before it has begun its journal, which it may never do: it can be looked at.

    What the rank notes itself is the same, so it may have done so meanwhile.
    """
    words = memory[:JOURNAL_BYTES].cast("Q")
    words[START_TIME_WORD] = start_time
    words[PID_WORD] = pid


class Journal:
    """The end that writes. For the use of one thread."""

    def __init__(self, memory: memoryview, epoch: int, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """`memory`: JOURNAL_BYTES, zeroed or prepared. `now_ns`: the clock of its times, that of whoever looks."""
        self.memory = memory[:JOURNAL_BYTES]
        self.words = self.memory.cast("Q")
        self.epoch = epoch
        self.now_ns = now_ns
        self._fence = new_fence()
        self.fence_stores = None if STORES_ARE_SEEN_IN_ORDER else self._fence
        """For stores that must not be seen in another order, where they could be."""
        self.mark_begun: Mark | None = None
        """Where collectives are only given to a device: has it write BEGUN_WORD, and the next one FINISHED_WORD."""
        self.mark_finished: Mark | None = None
        self.known: set[int] = set()
        """Digests that readers can look up."""
        me = Party.me("this rank")
        note_process(self.memory, me.pid, me.start_time)

    def offer_stacks(self, descriptor: int) -> None:
        """Say where readers find what this process is doing (stacks.py)."""
        self.words[STACKS_WORD] = descriptor

    def follow_device(self, mark_begun: Mark, mark_finished: Mark) -> None:
        """Collectives are given to a device from now on, which says by itself where it is: in BEGUN_WORD and in
        FINISHED_WORD. Call it before the first one, and before `group_notes`.
        """
        assert not self.words[LAST_WORD]
        self.mark_begun, self.mark_finished = mark_begun, mark_finished
        self.words[HAS_DEVICE_WORD] = 1

    def enter(self, phase: str) -> None:
        """Say what the rank does from now on."""
        self.words[PHASE_SINCE_WORD] = self.now_ns()
        self.words[PHASE_WORD] = PHASES.index(phase) if phase in PHASES else len(PHASES) - 1

    @contextmanager
    def awaiting(self, what: str, group: int = 0) -> Iterator[None]:
        """While this lasts, the rank waits for something that is no collective: one of OUTSIDE, for a group if any."""
        words = self.words
        before = words[OUTSIDE_WORD], words[OUTSIDE_SINCE_WORD]
        words[OUTSIDE_SINCE_WORD] = self.now_ns()
        words[OUTSIDE_WORD] = OUTSIDE.index(what) | group << OUTSIDE_GROUP_SHIFT
        try:
            yield
        finally:
            words[OUTSIDE_WORD], words[OUTSIDE_SINCE_WORD] = before

    @contextmanager
    def joining(self, group: int) -> Iterator[None]:
        """The rank has come to where all members of a group join it, and waits there for the others."""
        assert 0 < group < MAX_GROUPS, group
        self.words[JOINING_WORD] |= 1 << group
        with self.awaiting("the others' joining", group):
            yield

    def begin_step(self, step: int, digest: int, num_tokens: int, size: PlanSize | None = None) -> int:
        """A decision: the plan that the rank is about to follow. Returns the record's number, for `done`.

        `num_tokens` is of all replicas, `size` of the rank's own one. What is issued from now on, until `leave_step`,
        is of that step.
        """
        words, at = self.words, DECISIONS_WORD + step % NUM_DECISIONS * 2
        words[at] = 0
        self._fence()
        words[at + 1] = digest
        self._fence()
        words[at] = step
        words[OPEN_STEP_WORD] = words[STEP_WORD] = step
        return self.write(_BEGUN_STEP, 0, num_tokens, digest, size.word if size is not None else 0)

    @property
    def open_step(self) -> int:
        """That what is issued now is of; 0 if it is of none."""
        return self.words[OPEN_STEP_WORD]

    def leave_step(self) -> None:
        """All collectives of the step have been issued."""
        self.words[OPEN_STEP_WORD] = 0

    def write(self, kind: int, group: int, sequence: int, digest: int, rolling: int) -> int:
        """A record of a kind, of the step that is open. Returns its number."""
        words, fence = self.words, self.fence_stores
        number = words[LAST_WORD] + 1
        at = RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES
        word = at // WORD_BYTES
        words[word] = 0
        if fence is not None:
            fence()
        step, now_ns = words[OPEN_STEP_WORD], self.now_ns()
        _pack(self.memory, at, 0, self.epoch, group, kind, step, sequence, digest, rolling, now_ns, 0)
        if fence is not None:
            fence()
        words[word] = words[LAST_WORD] = number
        return number

    def issue(self, group: int, sequence: int, digest: int, rolling: int) -> int:
        """A collective that the rank is about to take part in. Returns the record's number, for `done`."""
        self.words[SEQUENCES_WORD + group] = sequence
        number = self.write(_COLLECTIVE, group, sequence, digest, rolling)
        if self.mark_begun is not None:
            self.mark_begun(number)
        return number

    def failed(self, number: int) -> None:
        """What was begun, if anything was and is not over, has ended with an error.

        A device is told nothing: it may be what has failed.
        """
        word = (RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES) // WORD_BYTES
        if number and self.words[word] == number and not self.words[word + DONE_WORD]:
            self.words[word + DONE_WORD] = self.now_ns()

    def done(self, number: int) -> None:
        """What was begun is over; of a collective on a device, the device has it."""
        word = (RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES) // WORD_BYTES
        if self.words[word] == number:  # else another record is there by now
            self.words[word + DONE_WORD] = self.now_ns()
            # A graph of several groups is over in all of them at once: what the newest one's marks say stays.
            if (
                self.mark_finished is not None
                and number > self.words[LAUNCHED_WORD]
                and self.memory[word * WORD_BYTES + KIND_AT] == _COLLECTIVE
            ):
                self.mark_finished(number)
                self.words[LAUNCHED_WORD] = number

    def note_captured(self, group: int, place: int, digest: int) -> None:
        """A collective that goes into a graph, as the `place`th of its group there, and not to the other ranks."""
        self.done(self.write(_CAPTURED, group, place, digest, digest))

    def undone(self, number: int) -> None:
        """What was over for this rank, as it had only been given away, is waited for from now on."""
        word = (RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES) // WORD_BYTES
        if self.words[word] == number:
            self.words[word + ISSUED_WORD] = self.now_ns()
            self.words[word + DONE_WORD] = 0

    def explain(self, digest: int, describe: Callable[[], str]) -> None:
        """Have readers know what a digest stands for. Costs nothing when they know it, or there is no more room."""
        if digest in self.known or len(self.known) == NUM_TEXTS:
            return
        at = TEXTS_AT + len(self.known) * TEXT_BYTES
        text = describe().encode()[:MOST_TEXT_BYTES]
        self.known.add(digest)
        self.words[at // WORD_BYTES] = digest
        self.memory[at + WORD_BYTES] = len(text)
        self.memory[at + WORD_BYTES + 1 :][: len(text)] = text
        self._fence()
        self.words[NUM_TEXTS_WORD] = len(self.known)
