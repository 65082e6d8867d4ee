"""A running instance as `phalanx doctor` shows it."""

from __future__ import annotations

import json
import os
import time

import msgspec
import pytest
from ledger_instances import hung, instance_of, reported

from phalanx.cli import instances, main
from phalanx.cli.instance_table import instance_table
from phalanx.cli.instances import check_of
from phalanx.ledger.instance import Instance, show
from phalanx.ledger.journal import JOURNAL_BYTES, GroupJournal, Journal
from phalanx.ledger.status import with_stacks
from phalanx.ledger.watcher import WatchedRank, WatchOrder
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


def test_nothing_in_it_is_markup() -> None:
    assert "[bold]x[/bold]" in instance_table(hung(None, "[bold]x[/bold]"))


def test_whether_it_is_well() -> None:
    well, sick = check_of(hung()), check_of(hung(reported(1)))
    assert (well.status, well.detail) == ("ok", "ranks 0, 1: stepping; rank 2: not begun")
    assert (sick.status, sick.detail) == ("fail", "late: rank 1 on here does it")
    stopped = check_of(msgspec.structs.replace(hung(), process="stopped"))
    assert stopped.status == "fail" and stopped.advice == "kill -CONT 100, or end it"


def test_an_instance_is_found_and_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks are this process, twice: one waits for the other."""
    me = Party.me("it")
    monkeypatch.setattr("phalanx.ledger.attach.STACKS", "no stacks")  # else this very process would be asked
    with SharedSegment.create(JOURNAL_BYTES, "a") as first, SharedSegment.create(JOURNAL_BYTES, "b") as second:
        journals = [Journal(segment.buf, epoch=1) for segment in (first, second)]
        for journal in journals:
            journal.enter("stepping")
            step = journal.begin_step(1, 1, num_tokens=1)
            if journal is journals[1]:
                journal.done(step)
                journal.enter("idle")
        GroupJournal(journals[0], 1).issue(1, 1, lambda: "all_reduce")
        ranks = tuple(
            WatchedRank(rank=rank, node="here", groups=("", "tp"), journal=segment.handle)
            for rank, segment in enumerate((first, second))
        )
        told = msgspec.structs.replace(
            instance_of(2, {"tp": [0, 1]}),
            pid=me.pid,
            start_time=me.start_time,
            version=__version__,
            order=WatchOrder(ranks=ranks, groups={"tp": (0, 1)}),
        )
        time.sleep(1.1)  # for so long somebody has to wait before another one is late
        beacon = show(told)
        try:
            assert main.run(["doctor", "--json", "--pid", str(me.pid), "--stacks"]) == 1
        finally:
            beacon.close()
    (check,) = json.loads(capsys.readouterr().out)
    assert check["facts"]["verdict"]["cause"] == "skipped" and check["facts"]["verdict"]["culprits"] == [1]
    assert [rank["waits_for"] for rank in check["facts"]["ranks"]] == [[1], []]
    assert not list(instances.running()) or all(one.pid != me.pid for one in instances.running())


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
