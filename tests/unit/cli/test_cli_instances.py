"""A running instance as `phalanx doctor` shows it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
from ledger_instances import hung, instance_of, reported, verdict_of

from phalanx.cli import instances, main
from phalanx.cli.instance_table import instance_table
from phalanx.cli.instances import check_of
from phalanx.ledger.attach import Attached
from phalanx.ledger.board import BOARD_BYTES, BoardWriter
from phalanx.ledger.instance import Instance, show
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.outlets import Outlets
from phalanx.ledger.status import with_stacks
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SharedSegment
from phalanx.version import __version__


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_the_table() -> None:
    table = instance_table(hung(reported(1, "tp@0")))
    assert all(line.startswith("  ") or not line for line in table.splitlines())
    lines = rows(table)
    assert ["models/tiny,", "at", "http://127.0.0.1:8000"] in lines
    assert any(line[:5] == ["0", "here", str(os.getpid()), "running", "stepping"] for line in lines)
    assert any(line[:2] == ["✗", "1"] and line[4] == "stopped" for line in lines)
    assert any(line[:3] == ["2", "here", "not"] for line in lines)
    waits = next(line for line in lines if line[:3] == ["…", "0", "tp@0"])
    assert waits[3:9] == ["2", "all_reduce", "float32", "[1,", "72]", "in"]
    assert any(line[:4] == ["✗", "1", "tp@0", "1"] and "done" in line for line in lines)
    assert any(line[-2:] == ["rank", "1"] for line in lines)


def test_stacks_stand_under_it() -> None:
    table = instance_table(with_stacks(hung(), {0: ("a.py:1 in f", "a.py:9 in g")}, ()))
    assert "  rank 0 is at\n    a.py:1 in f\n    a.py:9 in g\n" in table
    assert "rank 1 (stopped) does not say where it is" in table
    assert "the engine (running) does not say where it is" in table
    assert "is at" not in instance_table(hung())


def test_ranks_of_other_nodes_are_counted() -> None:
    assert "on other nodes" not in instance_table(hung())
    elsewhere = msgspec.structs.replace(hung(), world_size=5)
    assert "ranks on other nodes, of which nothing is known here: 2" in instance_table(elsewhere)


def test_nothing_in_it_is_markup() -> None:
    assert "[bold]x[/bold]" in instance_table(hung(None, "[bold]x[/bold]"))


def test_whether_it_is_well() -> None:
    well, sick = check_of(hung()), check_of(hung(reported(1)))
    assert (well.status, well.detail) == ("ok", "ranks 0, 1: stepping; rank 2: not begun")
    assert (sick.status, sick.detail) == ("fail", "late: rank 1 on here does it")
    stopped = check_of(msgspec.structs.replace(hung(), process="stopped"))
    assert stopped.status == "fail" and stopped.advice == "kill -CONT 100, or end it"
    assert check_of(msgspec.structs.replace(hung(), watcher_s=1.0)).status == "ok"
    unwatched = check_of(msgspec.structs.replace(hung(), watcher_s=7.5))
    assert unwatched.status == "warn" and unwatched.detail.endswith("its watcher has not looked for 7.5 s")


class Shown:
    """An instance whose engine and two ranks are this process: rank 0 waits for rank 1. Told as it is at `doctor`."""

    def __init__(self, stack: ExitStack, second: str) -> None:
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, f"journal {rank}")) for rank in range(2)]
        self._board = stack.enter_context(SharedSegment.create(BOARD_BYTES, "board"))
        for segment, what in zip(segments, ("all_reduce", second), strict=True):
            journal = Journal(segment.buf, epoch=1)
            journal.enter("stepping")
            journal.begin_step(1, 1, num_tokens=1)
            if what:
                journal.explain(len(what), what.__str__)
                journal.issue(1, 1, len(what), 0)
        me = Party.me("it")
        order = WatchOrder(
            ranks=tuple(
                WatchedRank(rank=rank, node="here", groups=("", "tp"), journal=segment.handle)
                for rank, segment in enumerate(segments)
            ),
            groups={"tp": (0, 1)},
            outlets=Outlets(board=self._board.handle, events=None, model="m"),
        )
        told = instance_of(2, {"tp": [0, 1]})
        told = msgspec.structs.replace(told, pid=me.pid, start_time=me.start_time, version=__version__, order=order)
        stack.callback(show(told).close)

    def post(self, verdict: Verdict | None) -> None:
        writer = BoardWriter(self._board.buf, num_ranks=2)
        writer.post(verdict, time.monotonic_ns())
        writer.looked(time.monotonic_ns())

    def doctor(self, code: int, capsys: pytest.CaptureFixture[str]) -> Any:
        assert main.run(["doctor", "--json", "--pid", str(os.getpid()), "--stacks"]) == code
        (check,) = json.loads(capsys.readouterr().out)
        return check["facts"]


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr("phalanx.ledger.attach.STACKS", "no stacks")  # else this very process would be asked
    with ExitStack() as stack:
        yield stack


def test_what_its_watcher_says_is_believed(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown(stack, second="")
    shown.post(None)
    facts = shown.doctor(0, capsys)
    assert facts["verdict"] is None and [rank["waits_for"] for rank in facts["ranks"]] == [[1], []]
    assert facts["ranks"][0]["waits_in"] == "all_reduce"
    shown.post(verdict_of("late", 1))
    verdict = shown.doctor(1, capsys)["verdict"]
    assert (verdict["cause"], verdict["culprits"]) == ("late", [1])


def test_the_board_is_read_while_somebody_looks_at_ranks(stack: ExitStack) -> None:
    Shown(stack, second="").post(verdict_of("late", 1))
    (found,) = (one for one in instances.running() if one.pid == os.getpid())
    assert found.instance is not None
    attached = stack.enter_context(Attached(found.instance))
    with attached._looking:  # as long as a look at many ranks takes
        assert attached.notice().verdict == verdict_of("late", 1)
        standing = attached.standing()
    assert standing is not None and standing.culprits == (1,)


def test_without_its_watcher_doctor_judges(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    facts = Shown(stack, second="broadcast").doctor(1, capsys)
    assert facts["watcher_s"] is None
    assert (facts["verdict"]["cause"], facts["verdict"]["culprits"]) == ("diverged", [0, 1])
    assert facts["verdict"]["is_ambiguous"]


def test_what_is_over_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        Shown(stack, second="")
    assert main.run(["doctor", "--json", "--pid", str(os.getpid())]) == 2


def test_one_of_another_build_is_told_and_not_read() -> None:
    class Other(msgspec.Struct):
        version: str
        pid: str

    told = msgspec.structs.replace(instance_of(1, {}), version="0.0.0")
    for content in (told, Other(__version__, "not a number")):
        beacon = show(content)  # type: ignore[arg-type]
        try:
            (found,) = [one for one in instances.running() if one.pid == os.getpid()]
        finally:
            beacon.close()
        assert found.instance is None
    assert Instance is type(told)
