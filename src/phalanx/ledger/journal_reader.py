"""What a journal says, for who did not write it. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec

from phalanx.ledger.journal_layout import (
    ANSWERER_WORD,
    BEGUN_WORD,
    DECISIONS_WORD,
    FINISHED_WORD,
    HAS_DEVICE_WORD,
    ISSUED_WORD,
    JOINING_WORD,
    JOURNAL_BYTES,
    LAST_WORD,
    LAUNCHED_WORD,
    MAX_GROUPS,
    NUM_DECISIONS,
    NUM_RECORDS,
    NUM_TEXTS_WORD,
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
from phalanx.ledger.record import ISSUED_AT, KIND_AT, LAYOUT, RECORD_BYTES, Kind, Record
from phalanx.transport.futex import new_fence

_IDLE = PHASES.index("idle")
_COLLECTIVE, _BEGUN_STEP = int(Kind.COLLECTIVE), int(Kind.STEP)

State = Literal["issued", "launched", "running", "done"]
"""Of a collective. issued: its call has not returned. On a device, launched: it is to come, running: it is in it."""


class DeviceMarks(msgspec.Struct, frozen=True):
    """How far a rank's collectives are on its device: numbers of records, each the newest of its kind."""

    launched: int
    begun: int
    finished: int


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
        return self._words[LAST_WORD], self._words[PHASE_SINCE_WORD]

    @property
    def noted_ns(self) -> int:
        """When its newest record, or its phase, began."""
        words = self._words
        newest = (RECORDS_AT + words[LAST_WORD] % NUM_RECORDS * RECORD_BYTES) // WORD_BYTES
        return max(words[newest + ISSUED_WORD], words[PHASE_SINCE_WORD])

    @property
    def last(self) -> int:
        """The number of the newest record, 0 before the first."""
        return self._words[LAST_WORD]

    @property
    def phase_since_ns(self) -> int:
        """When it has begun what it says that it does."""
        return self._words[PHASE_SINCE_WORD]

    def notes_since(self, since_ns: int) -> bool:
        """Whether it has noted something since then, of what it does by itself: no device may be behind with it.

        One function that reads what it needs: it is called when nothing of it is in the caches.
        """
        words = self._words
        newest = (RECORDS_AT + words[LAST_WORD] % NUM_RECORDS * RECORD_BYTES) // WORD_BYTES
        has_noted = words[PHASE_SINCE_WORD] > since_ns or words[newest + ISSUED_WORD] > since_ns
        return has_noted and not words[HAS_DEVICE_WORD]

    @property
    def is_idle(self) -> bool:
        """Whether it says that it is."""
        return self._words[PHASE_WORD] == _IDLE

    @property
    def pid(self) -> int:
        """0 as long as nobody knows the rank's process."""
        return self._words[PID_WORD]

    def read(self, most: int = NUM_RECORDS) -> Entries:
        """The newest `most` records, and all else. Never blocks; the memory may be written to meanwhile.

        A collective that a device is not through with is not done, whatever its record says.
        """
        words, fence = self._words, self._fence
        last, step, device = words[LAST_WORD], words[STEP_WORD], _device_marks(words)
        fence()
        first = max(1, last - min(most, NUM_RECORDS) + 1)
        if device is not None and device.finished < device.launched:
            first = max(1, last - NUM_RECORDS + 1, min(first, device.finished))
        records = tuple(_records(self._memory, words, range(first, last + 1), fence))
        if device is not None:
            records = tuple(_on_device(record, device) for record in records)
        fence()  # what a rank has issued is never older than its records: nobody seems to have left something out
        phase, outside = words[PHASE_WORD], words[OUTSIDE_WORD]
        return Entries(
            pid=words[PID_WORD],
            start_time=words[START_TIME_WORD],
            stacks=words[STACKS_WORD],
            phase=PHASES[phase] if phase < len(PHASES) else PHASES[-1],
            phase_since_ns=words[PHASE_SINCE_WORD],
            step=step,
            sequences=tuple(words[SEQUENCES_WORD : SEQUENCES_WORD + MAX_GROUPS].tolist()),
            records=records,
            texts=self._explained(),
            last=last,
            decisions=dict(self._decisions()),
            outside=OUTSIDE[outside & 0xFF],
            outside_group=outside >> OUTSIDE_GROUP_SHIFT,
            outside_since_ns=words[OUTSIDE_SINCE_WORD],
            joining=words[JOINING_WORD],
            answerer=words[ANSWERER_WORD],
            device=device,
        )

    def steps(self, after: int = 0) -> tuple[Record, ...]:
        """The records of steps alone, from the number `after` on, as far back as there are any: many times cheaper than
        all records."""
        last = self._words[LAST_WORD]
        first = max(last - NUM_RECORDS, after) + 1
        kinds = self._memory[RECORDS_AT + KIND_AT :: RECORD_BYTES]
        begin, end = first % NUM_RECORDS, (last + 1) % NUM_RECORDS
        numbers = []
        if first <= last:
            in_order = kinds[begin:end].tobytes() if begin < end else kinds[begin:].tobytes() + kinds[:end].tobytes()
            place = in_order.find(_BEGUN_STEP)
            while place >= 0:
                numbers.append(first + place)
                place = in_order.find(_BEGUN_STEP, place + 1)
        records = _records(self._memory, self._words, numbers, self._fence)
        return tuple(record for record in records if record.kind == _BEGUN_STEP)

    def noted(self, first: int, last: int) -> bytes:
        """What these records say, but for times: the same where ranks have done the same. Nothing is decoded."""
        self._fence()
        places = (RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES for number in range(first, last + 1))
        return b"".join([self._memory[at : at + ISSUED_AT] for at in places])

    def plans(self) -> bytes:
        """Which plans the newest steps have: the same where ranks follow the same. Nothing is decoded."""
        return self._words[DECISIONS_WORD : DECISIONS_WORD + 2 * NUM_DECISIONS].tobytes()

    def sequences(self) -> bytes:
        """How far it has come in each group. Nothing is decoded."""
        return self._words[SEQUENCES_WORD : SEQUENCES_WORD + MAX_GROUPS].tobytes()

    def _decisions(self) -> Iterator[tuple[int, int]]:
        words = self._words
        for at in range(DECISIONS_WORD, DECISIONS_WORD + 2 * NUM_DECISIONS, 2):
            step = words[at]
            self._fence()
            digest = words[at + 1]
            self._fence()
            if step and words[at] == step:
                yield step, digest

    def _explained(self) -> dict[int, str]:
        num_texts = self._words[NUM_TEXTS_WORD]
        if num_texts != self._num_texts:
            self._fence()
            self._texts.update(_texts(self._memory, self._words, range(self._num_texts, num_texts)))
            self._num_texts = num_texts
        return self._texts


def _device_marks(words: memoryview) -> DeviceMarks | None:
    return (
        DeviceMarks(words[LAUNCHED_WORD], words[BEGUN_WORD], words[FINISHED_WORD]) if words[HAS_DEVICE_WORD] else None
    )


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
        at = RECORDS_AT + number % NUM_RECORDS * RECORD_BYTES
        found = bytes(memory[at : at + RECORD_BYTES])
        fence()
        if words[at // WORD_BYTES] == number:
            fields = LAYOUT.unpack(found)
            if fields[0] == number:
                yield Record(*fields)


def _texts(memory: memoryview, words: memoryview, places: Iterable[int]) -> Iterable[tuple[int, str]]:
    for i in places:
        at = TEXTS_AT + i * TEXT_BYTES
        size = memory[at + WORD_BYTES]
        text = bytes(memory[at + WORD_BYTES + 1 :][:size]).decode(errors="replace")
        yield words[at // WORD_BYTES], text
