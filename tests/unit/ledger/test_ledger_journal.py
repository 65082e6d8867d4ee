"""What is written is read, whatever the reader catches the writer at."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from ledger_ranks import Named

from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal, note_process, prepare_journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES, NUM_RECORDS, NUM_TEXTS
from phalanx.ledger.journal_reader import Reader, read
from phalanx.ledger.record import Kind, rolled
from phalanx.transport.liveness import state_of
from phalanx.transport.shared_memory import SharedSegment


def fresh() -> tuple[memoryview, Journal]:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    return memory, Journal(memory, epoch=7)


def test_what_was_noted_is_read() -> None:
    memory, journal = fresh()
    journal.enter("stepping")
    step = journal.begin_step(41, 0xABC, num_tokens=9)
    group = group_notes(2, journal, None)
    reduce, gather = Named(0x11, "all_reduce float32 [3, 72]"), Named(0x22, "all_gather float32 [3, 130]")
    for collective in (reduce, gather):
        group.explain(collective)
    group.issue(reduce)
    group.done()
    group.issue(gather)
    entries = read(memory)
    assert (entries.pid, entries.phase, entries.step) == (os.getpid(), "stepping", 41)
    assert state_of(entries.pid, entries.start_time) in ("R", "S")
    assert entries.texts == {0x11: "all_reduce float32 [3, 72]", 0x22: "all_gather float32 [3, 130]"}
    decision, first, second = entries.records
    assert (decision.number, decision.kind, decision.step, decision.sequence) == (step, Kind.STEP, 41, 9)
    assert (first.epoch, first.group, first.kind, first.step, first.sequence) == (7, 2, Kind.COLLECTIVE, 41, 1)
    assert first.is_done and first.done_ns >= first.issued_ns > decision.issued_ns
    assert not second.is_done and second.rolling == rolled(first.rolling, 0x22)
    journal.done(step)
    assert read(memory).records[0].is_done


def test_a_process_is_known_before_it_notes_anything() -> None:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    prepare_journal(memory)
    assert (read(memory).pid, read(memory).phase) == (0, "starting")
    note_process(memory, 4711, 815)
    entries = read(memory)
    assert (entries.pid, entries.start_time, entries.phase, entries.last) == (4711, 815, "starting", 0)
    assert 0 < entries.phase_since_ns <= time.monotonic_ns()
    Journal(memory, epoch=7).enter("joining")
    assert (read(memory).pid, read(memory).phase) == (os.getpid(), "joining")


def test_a_phase_that_has_no_name_here_is_another() -> None:
    memory, journal = fresh()
    journal.enter("knitting")
    assert read(memory).phase == "another phase"


def test_a_long_life_leaves_the_newest() -> None:
    memory, journal = fresh()
    group = group_notes(1, journal, None)
    for sequence in range(1, 3 * NUM_RECORDS):
        collective = Named(sequence % (2 * NUM_TEXTS), "x" * 300)
        group.explain(collective)
        group.issue(collective)
        group.done()
    entries = read(memory)
    assert [record.sequence for record in entries.records] == list(range(2 * NUM_RECORDS, 3 * NUM_RECORDS))
    assert len(entries.texts) == NUM_TEXTS and max(map(len, entries.texts.values())) < 128
    assert [record.sequence for record in read(memory, most=3).records] == [3 * NUM_RECORDS - i for i in (3, 2, 1)]


@pytest.mark.parametrize("num_steps", [3, NUM_RECORDS // 3, NUM_RECORDS])
def test_steps_after_one_are_those_that_are_new(num_steps: int) -> None:
    memory, journal = fresh()
    group = group_notes(1, journal, None)
    for step in range(1, num_steps + 1):
        journal.begin_step(step, step, num_tokens=1)
        for _ in range(step % 4):
            group.issue(Named(0x11))
    steps = [record for record in read(memory).records if record.kind == Kind.STEP]
    assert steps and list(Reader(memory).steps()) == steps
    for known in (0, 1, len(steps) // 2, len(steps)):
        after = steps[known - 1].number if known else 0
        assert list(Reader(memory).steps(after)) == steps[known:]


def test_ranks_that_do_the_same_at_other_times_note_the_same() -> None:
    (memory, journal), (other_memory, other_journal) = fresh(), fresh()
    reader, other = Reader(memory), Reader(other_memory)
    groups = group_notes(1, journal, None), group_notes(1, other_journal, None)
    for _ in range(NUM_RECORDS + 5):
        for group in groups:
            group.issue(Named(0x11))
    assert reader.noted(NUM_RECORDS - 5, NUM_RECORDS + 5) == other.noted(NUM_RECORDS - 5, NUM_RECORDS + 5)
    assert (reader.sequences(), reader.plans()) == (other.sequences(), other.plans())
    groups[0].issue(Named(0x11))
    groups[1].issue(Named(0x22))
    assert reader.sequences() == other.sequences()
    assert reader.noted(NUM_RECORDS + 6, NUM_RECORDS + 6) != other.noted(NUM_RECORDS + 6, NUM_RECORDS + 6)
    for each in (journal, other_journal):
        each.begin_step(1, 7, num_tokens=1)
    assert reader.plans() == other.plans()
    journal.begin_step(2, 7, num_tokens=1)
    other_journal.begin_step(2, 8, num_tokens=1)
    assert reader.plans() != other.plans()


def test_who_notes_something_itself_has_done_so_since_then() -> None:
    memory, journal = fresh()
    reader = Reader(memory)
    journal.enter("idle")
    assert reader.notes_since(0) and not reader.notes_since(time.monotonic_ns())
    since_ns = time.monotonic_ns() - 1
    group_notes(1, journal, None).issue(Named(0x11))
    assert reader.notes_since(since_ns) and not reader.notes_since(time.monotonic_ns())


def test_who_gives_its_collectives_to_a_device_may_be_ahead_of_it() -> None:
    memory, journal = fresh()
    journal.follow_device(lambda number: None, lambda number: None)
    journal.enter("idle")
    assert not Reader(memory).notes_since(0)


def test_a_reader_never_sees_half_a_record() -> None:
    memory, journal = fresh()
    group, is_over = group_notes(1, journal, None), threading.Event()

    def write() -> None:
        sequence = 0
        while not is_over.is_set():
            sequence += 1
            group.issue(Named(sequence * 3))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        ends_at = time.monotonic() + 0.5
        while time.monotonic() < ends_at:
            for record in read(memory, most=40).records:
                assert record.digest == 3 * record.sequence
    finally:
        is_over.set()
        writer.join()


def test_a_journal_outlives_a_rank_that_is_killed() -> None:
    with SharedSegment.create(JOURNAL_BYTES, "journal") as segment:
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            journal = Journal(segment.buf, epoch=1)
            journal.enter("loading")
            group_notes(5, journal, None).issue(Named(9))
            os.write(told, b"!")
            time.sleep(60)
        os.read(ready, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)
        entries = read(segment.buf)
    assert (entries.pid, entries.phase, entries.records[0].group) == (pid, "loading", 5)
    assert state_of(entries.pid, entries.start_time) is None
