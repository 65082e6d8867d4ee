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
from phalanx.ledger.standing import Standing
from phalanx.ledger.verdict import Verdict
from phalanx.transport.shared_memory import SharedSegment

LOOK_NS = 30_000_000
NS = 10**9


def changes(standing: Standing, found: list[Verdict | None], start: int = 10**12) -> list[int]:
    """The looks at which something changes."""
    return [i for i, one in enumerate(found) if standing.take(one, start + i * LOOK_NS)]


def test_a_verdict_stands_after_a_while_and_until_it_is_missed_for_a_while() -> None:
    late, other = verdict_of("late", 1), verdict_of("late", 2)
    assert changes(Standing(), [late] * 5 + [None] + [late] * 20) == [13]
    assert changes(Standing(), [late] * 20 + [None] * 10 + [late] * 5 + [None] * 30) == [7, 52]
    assert changes(Standing(), [late] * 10 + [other] * 10) == [7, 17]
    assert changes(Standing(), [late, other] * 20) == []


def test_what_is_final_stands_at_once() -> None:
    standing = Standing()
    assert changes(standing, [None, verdict_of("gone", 1), verdict_of("gone", 1)]) == [1]
    assert standing.verdict == verdict_of("gone", 1)


def test_since_when() -> None:
    standing = Standing()
    for i in range(8):
        standing.take(verdict_of("late", 1, waited_s=1.0 + i * LOOK_NS / NS), 10 * NS + i * LOOK_NS)
    assert abs(standing.since_ns - 9 * NS) < 1000


def test_after_a_pause_it_is_looked_for_anew() -> None:
    standing, late = Standing(), verdict_of("late", 1)
    assert changes(standing, [late] * 5) == []
    assert changes(standing, [late] * 20, start=2 * 10**12) == [7]


def test_the_board() -> None:
    memory = memoryview(bytearray(BOARD_BYTES))
    assert read_board(memory) is None
    writer, standing = BoardWriter(memory, num_ranks=4), Standing()
    assert read_board(memory) == Notice(num_ranks=4)
    for culprit in (1, 2, 1):
        standing.verdict, standing.since_ns = verdict_of("late", culprit), 5
        writer.post(standing)
        writer.looked(77)
        found = read_board(memory)
        assert found is not None and (found.verdict, found.since_ns) == (verdict_of("late", culprit), 5)
        assert found.looked_ns == 77
    standing.verdict = None
    writer.post(standing)
    assert read_board(memory) == Notice(num_ranks=4, counts={"late": 3}, looked_ns=77)


def test_a_reader_in_the_middle_of_writing_sees_what_was_there() -> None:
    """The place that is written to is never the one that readers are sent to."""
    memory = memoryview(bytearray(BOARD_BYTES))
    writer, standing = BoardWriter(memory, num_ranks=2), Standing()
    standing.verdict = verdict_of("late", 1)
    writer.post(standing)
    seen: list[Notice | None] = []
    writer._fence = lambda: seen.append(read_board(memory))  # all is written then but the number
    standing.verdict = None
    writer.post(standing)
    assert seen[0] is not None and seen[0].verdict == verdict_of("late", 1)
    now = read_board(memory)
    assert now is not None and now.verdict is None


def test_a_watcher_that_looks_no_more_is_not_believed_unless_it_was_final() -> None:
    late = Notice(num_ranks=2, verdict=verdict_of("late", 1), since_ns=8 * NS, looked_ns=10 * NS)
    told = standing_of(late, 11 * NS)
    assert told is not None and (told.for_s, told.culprits) == (3.0, (1,))
    assert standing_of(late, 16 * NS) is None
    assert standing_of(msgspec.structs.replace(late, verdict=verdict_of("gone", 1)), 16 * NS) is not None
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
    path, late = tmp_path / "events", verdict_of("late", 1)
    path.write_text("what was there\n")
    with SharedSegment.create(BOARD_BYTES, "board") as board:
        outlets = Outlets(board=board.handle, events=str(path), model="m")
        with OpenOutlets(outlets, num_ranks=2) as opened:
            for i in range(40):
                if opened.looked(late if i < 10 else None, 10**12 + i * LOOK_NS):
                    opened.tell(msgspec.structs.replace(late, stacks={1: ("a.py:1 in f",)}), 10**12 + i * LOOK_NS)
                if i == 9:
                    notice = read_board(board.buf)
                    assert notice is not None and notice.verdict == late
        notice = read_board(board.buf)
        assert notice is not None and notice.verdict is None and notice.counts == {"late": 1}
    before, *lines = path.read_text().splitlines()
    assert before == "what was there"
    begun, over = map(json.loads, lines)
    assert (begun["event"], over["event"]) == ("verdict", "verdict_over")
    assert begun["engine_pid"] == os.getpid() and begun["verdict"]["stacks"]


def test_a_disk_that_is_full_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        board = stack.enter_context(SharedSegment.create(BOARD_BYTES, "board"))
        outlets = Outlets(board=board.handle, events="/dev/full", model="m")
        opened = stack.enter_context(OpenOutlets(outlets, num_ranks=2))
        assert opened.looked(verdict_of("gone", 1), 10**12)
        opened.tell(verdict_of("gone", 1), 10**12)
    assert "/dev/full: an event was not written: " in caplog.text
