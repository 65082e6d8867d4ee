"""A rank's journal: a ring of records in memory that another process holds too, so that it outlives the rank.

The rank writes and waits for nobody. Whoever reads does so without its help: while it computes, is stopped, holds the
GIL, or is dead.

    header     HEADER_BYTES: words, named below
    texts      NUM_TEXTS entries of TEXT_BYTES: a digest, a length, what the digest stands for
    records    NUM_RECORDS of RECORD_BYTES: record n is at n modulo NUM_RECORDS

Ordering: a record's number is zeroed before the rest is written and written after it, and others see that in this order
(where it takes a fence, there is one after each); a reader takes what it copied only if the number was right before and
after. No torch here.

Where collectives are only given to a device, it is the device that writes how far it is, into two words of the header.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec

from phalanx.ledger.record import (
    DONE_AT,
    ISSUED_AT,
    KIND_AT,
    LAYOUT,
    PRIME,
    RECORD_BYTES,
    WORD,
    Kind,
    PlanSize,
    Record,
)
from phalanx.transport.futex import STORES_ARE_SEEN_IN_ORDER, new_fence
from phalanx.transport.liveness import Party

HEADER_BYTES = 1024
MAX_GROUPS = 32
"""Of one rank, and none."""

NUM_TEXTS = 512
TEXT_BYTES = 128
NUM_RECORDS = 1024
JOURNAL_BYTES = HEADER_BYTES + NUM_TEXTS * TEXT_BYTES + NUM_RECORDS * RECORD_BYTES

PHASES = (
    *("not begun", "starting", "joining", "loading", "sizing", "allocating", "idle", "stepping"),
    *("moving experts", "leaving", "compiling", "capturing", "rebuilding", "calling a method", "switching weights"),
    *("falling asleep", "asleep", "waking", "another phase"),
)
"""What a worker says that it does; the order is part of the layout."""

_IDLE = PHASES.index("idle")

OUTSIDE = ("", "the store", "the others' joining")
"""What a rank may wait for that is no collective; the order is part of the layout."""

NUM_DECISIONS = 8
"""So many steps, at most, ranks are apart."""

_TEXTS = HEADER_BYTES
_RECORDS = HEADER_BYTES + NUM_TEXTS * TEXT_BYTES
_WORD_BYTES = 8
_MOST_TEXT = TEXT_BYTES - _WORD_BYTES - 1
_DONE = DONE_AT // _WORD_BYTES
_COLLECTIVE, _BEGUN_STEP, _CAPTURED = int(Kind.COLLECTIVE), int(Kind.STEP), int(Kind.CAPTURED)
_ISSUED = ISSUED_AT // _WORD_BYTES
_pack = LAYOUT.pack_into

WriteOnDevice = Callable[[int, int], None]
"""Has the device write a number to the word at an offset in bytes, when it has come so far in what it was given."""

State = Literal["issued", "launched", "running", "done"]
"""Of a collective. issued: its call has not returned. On a device, launched: it is to come, running: it is in it."""


# Of the header: places in 64-bit words. Plain numbers: an enum's member takes as long to look up as a word to write.
_LAST = 0  # the number of the newest record
_PHASE = 1
_PHASE_SINCE = 2
_PID = 3
_START_TIME = 4
_NUM_TEXTS = 5
_STEP = 6  # that the rank is in, or was in last
_STACKS = 7  # the descriptor that the process's stacks are read from; 0 if there is none
_HAS_DEVICE = 8  # 1 if the three below count
_LAUNCHED = 9  # the newest collective that the device has been given
_OUTSIDE = 10  # what is waited for that is no collective: an index into OUTSIDE, and the group from bit 8 on
_OUTSIDE_SINCE = 11
_JOINING = 12  # a bit for each group whose joining has begun
_ASKED = 13  # four bytes of it: how often somebody has asked whether the interpreter runs (pulse.py)
_ANSWERED = 14  # up to which of them it has answered
_ANSWERER = 15  # the thread that answers, as the kernel numbers it; 0 if there is none
_BEGUN = 16  # the newest collective that the device has come to: written by it, on a cache line of their own
_FINISHED = 17  # the newest one that it is through with: likewise
_OPEN_STEP = 24  # that what is issued now is of; 0 if it is of none
_SEQUENCES = 32  # of each group's newest collective, which may be older than all records
_DECISIONS = 64  # the newest steps, at step modulo NUM_DECISIONS: its number and its digest
_GROUP_SHIFT = 8
ASKED_AT, ANSWERED_AT, ANSWERER_AT = _ASKED * _WORD_BYTES, _ANSWERED * _WORD_BYTES, _ANSWERER * _WORD_BYTES


def prepare_journal(memory: memoryview) -> None:
    """For who makes a journal, before the rank's process can be there: it is starting from now on."""
    words = memory[:JOURNAL_BYTES].cast("Q")
    words[_PHASE_SINCE] = time.monotonic_ns()
    words[_PHASE] = PHASES.index("starting")


def note_process(memory: memoryview, pid: int, start_time: int) -> None:
    """For who knows the rank's process before it has begun its journal, which it may never do: it can be looked at.

    What the rank notes itself is the same, so it may have done so meanwhile.
    """
    words = memory[:JOURNAL_BYTES].cast("Q")
    words[_START_TIME] = start_time
    words[_PID] = pid


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
        self.follows_device = False
        """Whether collectives are only given to a device."""
        self._write_on_device: WriteOnDevice | None = None
        self.known: set[int] = set()
        """Digests that readers can look up."""
        me = Party.me("this rank")
        note_process(self.memory, me.pid, me.start_time)

    def offer_stacks(self, descriptor: int) -> None:
        """Say where readers find what this process is doing (stacks.py)."""
        self.words[_STACKS] = descriptor

    def follow_device(self, write: WriteOnDevice) -> None:
        """Collectives are given to a device from now on, which says by itself where it is. Call it before the first."""
        assert not self.words[_LAST]
        self._write_on_device = write
        self.follows_device = True
        self.words[_HAS_DEVICE] = 1

    def enter(self, phase: str) -> None:
        """Say what the rank does from now on."""
        self.words[_PHASE_SINCE] = self.now_ns()
        self.words[_PHASE] = PHASES.index(phase) if phase in PHASES else len(PHASES) - 1

    @contextmanager
    def awaiting(self, what: str, group: int = 0) -> Iterator[None]:
        """While this lasts, the rank waits for something that is no collective: one of OUTSIDE, for a group if any."""
        words = self.words
        before = words[_OUTSIDE], words[_OUTSIDE_SINCE]
        words[_OUTSIDE_SINCE] = self.now_ns()
        words[_OUTSIDE] = OUTSIDE.index(what) | group << _GROUP_SHIFT
        try:
            yield
        finally:
            words[_OUTSIDE], words[_OUTSIDE_SINCE] = before

    @contextmanager
    def joining(self, group: int) -> Iterator[None]:
        """The rank has come to where all members of a group join it, and waits there for the others."""
        assert 0 < group < MAX_GROUPS, group
        self.words[_JOINING] |= 1 << group
        with self.awaiting("the others' joining", group):
            yield

    def begin_step(self, step: int, digest: int, num_tokens: int, size: PlanSize | None = None) -> int:
        """A decision: the plan that the rank is about to follow. Returns the record's number, for `done`.

        `num_tokens` is of all replicas, `size` of the rank's own one. What is issued from now on, until `leave_step`,
        is of that step.
        """
        words, at = self.words, _DECISIONS + step % NUM_DECISIONS * 2
        words[at] = 0
        self._fence()
        words[at + 1] = digest
        self._fence()
        words[at] = step
        words[_OPEN_STEP] = words[_STEP] = step
        return self.write(_BEGUN_STEP, 0, num_tokens, digest, size.word if size is not None else 0)

    def leave_step(self) -> None:
        """All collectives of the step have been issued."""
        self.words[_OPEN_STEP] = 0

    def write(self, kind: int, group: int, sequence: int, digest: int, rolling: int) -> int:
        """A record of a kind, of the step that is open. Returns its number."""
        words, fence = self.words, self.fence_stores
        number = words[_LAST] + 1
        at = _RECORDS + number % NUM_RECORDS * RECORD_BYTES
        word = at // _WORD_BYTES
        words[word] = 0
        if fence is not None:
            fence()
        step, now_ns = words[_OPEN_STEP], self.now_ns()
        _pack(self.memory, at, 0, self.epoch, group, kind, step, sequence, digest, rolling, now_ns, 0)
        if fence is not None:
            fence()
        words[word] = words[_LAST] = number
        return number

    def issue(self, group: int, sequence: int, digest: int, rolling: int) -> int:
        """A collective that the rank is about to take part in. Returns the record's number, for `done`."""
        self.words[_SEQUENCES + group] = sequence
        number = self.write(_COLLECTIVE, group, sequence, digest, rolling)
        if self._write_on_device is not None:
            self._write_on_device(_BEGUN * _WORD_BYTES, number)
        return number

    def failed(self, number: int) -> None:
        """What was begun has ended with an error. A device is told nothing: it may be what has failed."""
        word = (_RECORDS + number % NUM_RECORDS * RECORD_BYTES) // _WORD_BYTES
        if self.words[word] == number:
            self.words[word + _DONE] = self.now_ns()

    def done(self, number: int) -> None:
        """What was begun is over; of a collective on a device, the device has it."""
        word = (_RECORDS + number % NUM_RECORDS * RECORD_BYTES) // _WORD_BYTES
        if self.words[word] == number:  # else another record is there by now
            self.words[word + _DONE] = self.now_ns()
            # A graph of several groups is over in all of them at once: what the newest one's marks say stays.
            if (
                self._write_on_device is not None
                and number > self.words[_LAUNCHED]
                and self.memory[word * _WORD_BYTES + KIND_AT] == _COLLECTIVE
            ):
                self._write_on_device(_FINISHED * _WORD_BYTES, number)
                self.words[_LAUNCHED] = number

    def note_captured(self, group: int, place: int, digest: int) -> None:
        """A collective that goes into a graph, as the `place`th of its group there, and not to the other ranks."""
        self.done(self.write(_CAPTURED, group, place, digest, digest))

    def undone(self, number: int) -> None:
        """What was over for this rank, as it had only been given away, is waited for from now on."""
        word = (_RECORDS + number % NUM_RECORDS * RECORD_BYTES) // _WORD_BYTES
        if self.words[word] == number:
            self.words[word + _ISSUED] = self.now_ns()
            self.words[word + _DONE] = 0

    def explain(self, digest: int, describe: Callable[[], str]) -> None:
        """Have readers know what a digest stands for. Costs nothing when they know it, or there is no more room."""
        if digest in self.known or len(self.known) == NUM_TEXTS:
            return
        at = _TEXTS + len(self.known) * TEXT_BYTES
        text = describe().encode()[:_MOST_TEXT]
        self.known.add(digest)
        self.words[at // _WORD_BYTES] = digest
        self.memory[at + _WORD_BYTES] = len(text)
        self.memory[at + _WORD_BYTES + 1 :][: len(text)] = text
        self._fence()
        self.words[_NUM_TEXTS] = len(self.known)


class GroupJournal:
    """One group's part of a rank's journal.

    Its methods are functions that have all they need at hand, and do without calls: between two collectives a rank's
    weights go through its caches, so that each function and each attribute costs a wait for memory, several times what
    it takes in a loop (3 to 8 µs a collective then, instead of 14).
    """

    issue: Callable[[int, int, Callable[[], str]], None]
    """The group's next collective begins: its sequence number, its digest, and what gives that in words."""
    note_captured: Callable[[int, int, Callable[[], str]], None]
    """A collective goes into a graph instead, as the so-many-th of its group there; `done` has nothing to say of it."""
    done: Callable[[], None]
    """It is over."""
    failed: Callable[[], None]
    """It has ended with an error. Raises none of its own, which would hide that."""

    def __init__(self, journal: Journal, group: int) -> None:
        assert 0 < group < MAX_GROUPS, group
        memory, words, epoch, now_ns = journal.memory, journal.words, journal.epoch, journal.now_ns
        known, fence, sequence_at = journal.known, journal.fence_stores, _SEQUENCES + group
        rolling = newest = 0

        def issue(sequence: int, digest: int, describe: Callable[[], str]) -> None:
            nonlocal rolling, newest
            step = words[_OPEN_STEP]
            if step:  # a method's own may differ: its caller hears of it, and the ranks go on
                rolling = ((rolling ^ digest) * PRIME) & WORD  # `rolled`, for each collective a call less
            if digest not in known:
                journal.explain(digest, describe)
            if journal.follows_device:
                newest = journal.issue(group, sequence, digest, rolling)
            else:
                words[sequence_at] = sequence
                # What `Journal.write` does.
                number = words[_LAST] + 1
                at = _RECORDS + number % NUM_RECORDS * RECORD_BYTES
                word = at // _WORD_BYTES
                words[word] = 0
                if fence is not None:
                    fence()
                _pack(memory, at, 0, epoch, group, _COLLECTIVE, step, sequence, digest, rolling, now_ns(), 0)
                if fence is not None:
                    fence()
                newest = words[word] = words[_LAST] = number

        def note_captured(place: int, digest: int, describe: Callable[[], str]) -> None:
            nonlocal newest
            if digest not in known:
                journal.explain(digest, describe)
            newest = 0
            journal.note_captured(group, place, digest)

        def done() -> None:
            if journal.follows_device:
                if newest:
                    journal.done(newest)
                return
            word = (_RECORDS + newest % NUM_RECORDS * RECORD_BYTES) // _WORD_BYTES
            if newest and words[word] == newest:
                words[word + _DONE] = now_ns()

        def failed() -> None:
            if newest:
                journal.failed(newest)

        self.issue, self.note_captured, self.done, self.failed = issue, note_captured, done, failed


class DeviceMarks(msgspec.Struct, frozen=True):
    """How far a rank's collectives are on its device: numbers of records, each the newest of its kind."""

    launched: int
    begun: int
    finished: int


class NoJournal:
    """The part of a group in a journal that nobody keeps."""

    def issue(self, sequence: int, digest: int, describe: Callable[[], str]) -> None:
        """Nothing."""

    def note_captured(self, place: int, digest: int, describe: Callable[[], str]) -> None:
        """Nothing."""

    def done(self) -> None:
        """Nothing."""

    def failed(self) -> None:
        """Nothing."""


class Entries(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal said at one moment."""

    pid: int
    """0 as long as nobody knows the rank's process."""
    start_time: int
    stacks: int
    """The descriptor that the process's stacks are read from; 0 if there is none."""
    phase: str
    phase_since_ns: int
    step: int
    sequences: tuple[int, ...]
    """Of the newest collective of each group, by the group's index; 0 before the first."""
    records: tuple[Record, ...]
    """The newest ones, in their order; all that a device is not through with, as far as the journal has them."""
    texts: dict[int, str]
    """What digests stand for. Grows while a reader of the same journal is used; not to be changed."""
    last: int = 0
    """The number of the newest record, 0 before the first."""
    decisions: dict[int, int] = {}
    """The digests of the newest steps' plans, by step: more lasting than their records."""
    outside: str = ""
    """What the rank waits for that is no collective, of OUTSIDE; "" if for nothing."""
    outside_group: int = 0
    """The index of the group that it waits to join, or needs the store for; 0 if there is none."""
    outside_since_ns: int = 0
    joining: int = 0
    """A bit for each group, by its index, whose joining the rank has come to."""
    answerer: int = 0
    """The thread that says whether the interpreter runs, as the kernel numbers it; 0 if there is none."""

    device: DeviceMarks | None = None
    """None where who calls a collective waits for it."""

    def state(self, collective: Record) -> State:
        """How far it is."""
        if collective.is_done or (self.device is not None and collective.number <= self.device.finished):
            return "done"
        if self.device is None or collective.number > self.device.launched:
            return "issued"
        return "running" if collective.number <= self.device.begun else "launched"

    def has_come_to_join(self, group: int) -> bool:
        """Whether it has come to the joining of the group with this index."""
        return bool(self.joining >> group & 1)


class Reader:
    """The end that reads, for looks one after the other: what does not change is decoded once."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory[:JOURNAL_BYTES]
        self._words = self._memory.cast("Q")
        self._fence = new_fence()
        self._texts: dict[int, str] = {}
        self._num_texts = 0

    @property
    def moved(self) -> tuple[int, int]:
        """Differs from before if the rank has noted something since: a record, or a phase."""
        return self._words[_LAST], self._words[_PHASE_SINCE]

    @property
    def noted_ns(self) -> int:
        """When its newest record, or its phase, began."""
        words = self._words
        newest = (_RECORDS + words[_LAST] % NUM_RECORDS * RECORD_BYTES) // _WORD_BYTES
        return max(words[newest + _ISSUED], words[_PHASE_SINCE])

    @property
    def is_idle(self) -> bool:
        """Whether it says that it is."""
        return self._words[_PHASE] == _IDLE

    @property
    def pid(self) -> int:
        """0 as long as nobody knows the rank's process."""
        return self._words[_PID]

    def read(self, most: int = NUM_RECORDS) -> Entries:
        """The newest `most` records, and all else. Never blocks; the memory may be written to meanwhile.

        A collective that a device is not through with is not done, whatever its record says.
        """
        words, fence = self._words, self._fence
        last, step, device = words[_LAST], words[_STEP], _device_marks(words)
        fence()
        first = max(1, last - min(most, NUM_RECORDS) + 1)
        if device is not None and device.finished < device.launched:
            first = max(1, last - NUM_RECORDS + 1, min(first, device.finished))
        records = tuple(_records(self._memory, words, range(first, last + 1), fence))
        if device is not None:
            records = tuple(_on_device(record, device) for record in records)
        fence()  # what a rank has issued is never older than its records: nobody seems to have left something out
        phase, outside = words[_PHASE], words[_OUTSIDE]
        return Entries(
            pid=words[_PID],
            start_time=words[_START_TIME],
            stacks=words[_STACKS],
            phase=PHASES[phase] if phase < len(PHASES) else PHASES[-1],
            phase_since_ns=words[_PHASE_SINCE],
            step=step,
            sequences=tuple(words[_SEQUENCES : _SEQUENCES + MAX_GROUPS].tolist()),
            records=records,
            texts=self._explained(),
            last=last,
            decisions=dict(self._decisions()),
            outside=OUTSIDE[outside & 0xFF],
            outside_group=outside >> _GROUP_SHIFT,
            outside_since_ns=words[_OUTSIDE_SINCE],
            joining=words[_JOINING],
            answerer=words[_ANSWERER],
            device=device,
        )

    def steps(self) -> tuple[Record, ...]:
        """The records of steps alone, as far back as there are any: many times cheaper than all records."""
        kinds = self._memory[_RECORDS + KIND_AT :: RECORD_BYTES].tobytes()
        first = max(1, self._words[_LAST] - NUM_RECORDS + 1)
        numbers, at = [], kinds.find(_BEGUN_STEP)
        while at >= 0:
            numbers.append(first + (at - first) % NUM_RECORDS)
            at = kinds.find(_BEGUN_STEP, at + 1)
        found = _records(self._memory, self._words, sorted(numbers), self._fence)
        return tuple(record for record in found if record.kind == _BEGUN_STEP)

    def _decisions(self) -> Iterator[tuple[int, int]]:
        words = self._words
        for at in range(_DECISIONS, _DECISIONS + 2 * NUM_DECISIONS, 2):
            step = words[at]
            self._fence()
            digest = words[at + 1]
            self._fence()
            if step and words[at] == step:
                yield step, digest

    def _explained(self) -> dict[int, str]:
        num_texts = self._words[_NUM_TEXTS]
        if num_texts != self._num_texts:
            self._fence()
            self._texts.update(_texts(self._memory, self._words, range(self._num_texts, num_texts)))
            self._num_texts = num_texts
        return self._texts


def _device_marks(words: memoryview) -> DeviceMarks | None:
    return DeviceMarks(words[_LAUNCHED], words[_BEGUN], words[_FINISHED]) if words[_HAS_DEVICE] else None


def _on_device(record: Record, device: DeviceMarks) -> Record:
    is_open = record.kind == _COLLECTIVE and record.number > device.finished
    return record._replace(done_ns=0) if is_open else record


def read(memory: memoryview, most: int = NUM_RECORDS) -> Entries:
    """One look at a journal: the newest `most` records, and all else. Never blocks."""
    return Reader(memory).read(most)


def _records(
    memory: memoryview, words: memoryview, numbers: Iterable[int], fence: Callable[[], None]
) -> Iterable[Record]:
    for number in numbers:
        at = _RECORDS + number % NUM_RECORDS * RECORD_BYTES
        found = bytes(memory[at : at + RECORD_BYTES])
        fence()
        if words[at // _WORD_BYTES] == number:
            fields = LAYOUT.unpack(found)
            if fields[0] == number:
                yield Record(*fields)


def _texts(memory: memoryview, words: memoryview, places: Iterable[int]) -> Iterable[tuple[int, str]]:
    for i in places:
        at = _TEXTS + i * TEXT_BYTES
        size = memory[at + _WORD_BYTES]
        text = bytes(memory[at + _WORD_BYTES + 1 :][:size]).decode(errors="replace")
        yield words[at // _WORD_BYTES], text
