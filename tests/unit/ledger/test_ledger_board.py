"""What stands is written where anybody can read it, and as JSON lines."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from ledger_instances import NOON, verdict_of

from phalanx.ledger.attach import silent_s, standing_of
from phalanx.ledger.board import BOARD_BYTES, BoardWriter, Notice, read_board
from phalanx.ledger.events import event_of
from phalanx.ledger.outlets import OpenOutlets, Outlets
from phalanx.ledger.report import paragraph, report
from phalanx.transport.shared_memory import SharedSegment

NS = 10**9


def test_the_board() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    assert read_board(memory) is None
    writer = BoardWriter(memory, num_ranks=4)
    assert read_board(memory) == Notice(num_ranks=4)
    for culprit in (1, 2, 1):
        writer.post(verdict_of("late", culprit), 5)
        writer.looked(77)
        found = read_board(memory)
        assert found is not None and (found.verdict, found.since_ns) == (verdict_of("late", culprit), 5)
        assert found.looked_ns == 77
    writer.post(None, 0)
    assert read_board(memory) == Notice(num_ranks=4, counts={"late": 3}, looked_ns=77)


def test_one_that_never_came_to_write_counts() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    BoardWriter(memory, num_ranks=2, num_restarts=1)
    assert read_board(memory) == Notice(num_ranks=2, num_restarts=1)


@pytest.mark.parametrize("still_stands", [True, False])
def test_another_writer_takes_over(still_stands: bool) -> None:
    memory, late = memoryview(bytearray(BOARD_BYTES)), verdict_of("late", 1)
    BoardWriter(memory, num_ranks=2).post(late, 5)
    writer = BoardWriter(memory, num_ranks=2, standing=late if still_stands else None, num_restarts=1)
    stands = {"verdict": late, "since_ns": 5} if still_stands else {}
    assert read_board(memory) == Notice(num_ranks=2, counts={"late": 1}, num_restarts=1, **stands)
    writer.post(verdict_of("late", 0), 6)
    found = read_board(memory)
    assert found is not None and (found.counts, found.since_ns, found.num_restarts) == ({"late": 2}, 6, 1)
    writer.restarted(3)
    assert read_board(memory) == msgspec.structs.replace(found, num_restarts=3), "and all else stands"


def test_a_reader_in_the_middle_of_writing_sees_what_was_there() -> None:
    """The place that is written to is never the one that readers are sent to."""
    memory = memoryview(bytearray(BOARD_BYTES))
    writer = BoardWriter(memory, num_ranks=2)
    writer.post(verdict_of("late", 1), 5)
    seen: list[Notice | None] = []
    writer._newest._fence = lambda: seen.append(read_board(memory))  # all is written then but the number
    writer.post(None, 0)
    assert seen[0] is not None and seen[0].verdict == verdict_of("late", 1)
    now = read_board(memory)
    assert now is not None and now.verdict is None


def test_a_watcher_that_looks_no_more_is_not_believed_unless_it_was_final() -> None:
    late = Notice(num_ranks=2, verdict=verdict_of("late", 1), since_ns=8 * NS, looked_ns=10 * NS)
    told = standing_of(late, 11 * NS)
    assert told is not None and (told.for_s, told.culprits) == (3.0, (1,))
    assert standing_of(late, 16 * NS) is None
    assert standing_of(msgspec.structs.replace(late, verdict=verdict_of("gone", 1)), 16 * NS) is not None
    assert standing_of(late, 16 * NS, awaits_since_ns=10 * NS) is not None, "no step since, though one is waited for"
    assert standing_of(late, 16 * NS, awaits_since_ns=10 * NS + 1) is None, "it has come"
    assert standing_of(Notice(), 16 * NS, awaits_since_ns=10 * NS) is None
    assert standing_of(Notice(), 16 * NS) is None
    assert (silent_s(late, 16 * NS), silent_s(Notice(), 16 * NS)) == (6.0, None)


def test_a_report_says_since_when_and_has_no_stacks() -> None:
    verdict = msgspec.structs.replace(verdict_of("late", 1), stacks={1: ("a.py:1 in f",)}, step=3)
    found = report(verdict, since_ns=4 * NS, now_ns=6 * NS, now=NOON)
    assert (found.for_s, found.since.isoformat(), found.step) == (2.0, "2030-01-01T11:59:58+00:00", 3)
    assert found.paragraph == paragraph(verdict) == "rank 1 on here does it"


def test_events() -> None:
    verdict = msgspec.structs.replace(verdict_of("late", 1), stacks={1: ("a.py:1 in f",)})
    settings = {"since_ns": 0, "now_ns": 2 * NS, "now": NOON, "model": "m", "engine_pid": 5}
    begun, over = (event_of(verdict, is_over=is_over, **settings) for is_over in (False, True))
    assert (begun.event, begun.level, begun.message) == ("verdict", "warning", "rank 1 on here does it")
    assert (over.event, over.level) == ("verdict_over", "info")
    assert over.message == "over after 2.0 s: rank 1 on here does it"
    assert event_of(verdict_of("gone", 1), is_over=False, **settings).level == "error"
    told = json.loads(msgspec.json.encode(begun))
    assert told["time"] == "2030-01-01T12:00:00Z" and told["verdict"]["stacks"] == {"1": ["a.py:1 in f"]}


def test_outlets(tmp_path: Path) -> None:
    path, late = tmp_path / "events", verdict_of("late", 1, waited_s=1.0)
    path.write_text("what was there\n")
    with SharedSegment.create(BOARD_BYTES, "board") as board:
        outlets = Outlets(board=board.handle, events=str(path), model="m")
        with OpenOutlets(outlets, num_ranks=2) as opened:
            opened.stands(None, 9 * NS)
            opened.stands(late, 10 * NS)
            opened.tell(msgspec.structs.replace(late, stacks={1: ("a.py:1 in f",)}), 10 * NS)
            opened.stands(late, 11 * NS)
            notice = read_board(board.buf)
            assert notice is not None and (notice.verdict, notice.since_ns) == (late, 9 * NS)
            assert notice.looked_ns == 11 * NS
            opened.stands(None, 12 * NS)
        notice = read_board(board.buf)
        assert notice is not None and notice.verdict is None and notice.counts == {"late": 1}
    before, *lines = path.read_text().splitlines()
    assert before == "what was there"
    begun, over = map(json.loads, lines)
    assert [(event["event"], event["for_s"]) for event in (begun, over)] == [("verdict", 1.0), ("verdict_over", 3.0)]
    assert begun["engine_pid"] == os.getpid() and begun["verdict"]["stacks"]


def test_outlets_that_go_on_with_what_stands(tmp_path: Path) -> None:
    path, late = tmp_path / "events", verdict_of("late", 1, waited_s=1.0)
    with SharedSegment.create(BOARD_BYTES, "board") as board:
        outlets = Outlets(board=board.handle, events=str(path), model="m")
        with OpenOutlets(outlets, num_ranks=2) as before:
            before.stands(late, 10 * NS)
        with OpenOutlets(outlets, num_ranks=2, standing=late) as opened:
            opened.stands(late, 11 * NS)
            opened.stands(None, 12 * NS)
        notice = read_board(board.buf)
        assert notice is not None and (notice.verdict, notice.counts) == (None, {"late": 1})
    (over,) = map(json.loads, path.read_text().splitlines())
    assert (over["event"], over["for_s"]) == ("verdict_over", 3.0)


def test_a_disk_that_is_full_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        board = stack.enter_context(SharedSegment.create(BOARD_BYTES, "board"))
        outlets = Outlets(board=board.handle, events="/dev/full", model="m")
        opened = stack.enter_context(OpenOutlets(outlets, num_ranks=2))
        opened.stands(verdict_of("gone", 1), 10**12)
        opened.tell(verdict_of("gone", 1), 10**12)
    assert "/dev/full: an event was not written: " in caplog.text
