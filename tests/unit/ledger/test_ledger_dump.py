"""Dumps are whole or not there, few, and say what the journals said."""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from ledger_ranks import Named, WritingRank, look_at

from phalanx.config import Config
from phalanx.errors import ConfigError, DumpError
from phalanx.executor.journals import dump_order
from phalanx.executor.watching import Watching
from phalanx.ledger import dump
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.judge import judge
from phalanx.ledger.look import Look
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.shared_memory import SharedSegment

GROUPS = {"tp@0": (0, 1, 2)}
REDUCE, GATHER = "all_reduce float32 [3, 72]", "all_gather float32 [3, 130]"


def diverged() -> Look:
    """Rank 0 has gathered where its peers have summed up."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(3)]
    for rank in ranks:
        rank.begin(1)
        rank.collective("tp@0", REDUCE)
        rank.issue("tp@0", REDUCE if rank.rank else GATHER)
    return look_at(ranks, GROUPS)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    look = diverged()
    verdict = judge(look)
    path = dump.write(tmp_path, look, verdict, {"tensor_parallel_size": "3"})
    assert path.stat().st_mode & 0o777 == 0o700, "nobody else reads it"
    assert path.parent == tmp_path and path.name.endswith("-diverged-rank-0")
    assert sorted(file.name for file in path.iterdir()) == ["dump.json", *(f"rank_{i}.msgpack" for i in range(3))]
    for directory in (path, tmp_path):
        found = dump.read(directory)
        assert (found.look.ranks, found.look.now_ns, found.verdict) == (look.ranks, look.now_ns, verdict)
        assert found.missing == () and found.notes == ()
    facts = msgspec.json.decode((path / "dump.json").read_bytes())["facts"]
    assert facts["settings"] == {"tensor_parallel_size": "3"}


def test_without_a_verdict_it_is_judged_when_it_is_read(tmp_path: Path) -> None:
    found = dump.read(dump.write(tmp_path, diverged(), None))
    assert found.verdict is not None and found.verdict.culprits == (0,)


def test_ranks_that_are_on_their_way_are_not_to_blame(tmp_path: Path) -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(3)]
    for rank in ranks:
        rank.begin(1)
    ranks[1].issue("tp@0", REDUCE)
    look = look_at(ranks, GROUPS)
    assert dump.read(dump.write(tmp_path / "now", look, None)).verdict is None
    later = look._replace(now_ns=look.now_ns + 2 * 10**9)
    verdict = dump.read(dump.write(tmp_path / "later", later, None)).verdict
    assert verdict is not None and verdict.cause == "late"


def test_all_in_one_collective_that_does_not_end(tmp_path: Path) -> None:
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(3)]
    for rank in ranks:
        rank.begin(1)
        rank.issue("tp@0", REDUCE)
    look = look_at(ranks, GROUPS)
    look = look._replace(now_ns=look.now_ns + 5 * 10**9)
    path = dump.write(tmp_path, look, judge(look))
    found = dump.read(path)
    assert path.name.endswith("-hung")
    assert found.verdict is not None and (found.verdict.cause, found.verdict.culprits) == ("hung", ())


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    path = dump.write(tmp_path, diverged(), None)
    (path / "rank_2.msgpack").unlink()
    found = dump.read(path)
    assert found.missing == (2,) and found.notes == ("rank_2.msgpack is missing: what rank 2 did is not known",)


@pytest.mark.parametrize("name", ["rank_1.msgpack", "dump.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = dump.write(tmp_path, diverged(), None)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DumpError, match=f"{name} is torn"):
        dump.read(path)


def test_a_file_that_is_nested_without_end_is_named(tmp_path: Path) -> None:
    path = dump.write(tmp_path, diverged(), None)
    (path / "dump.json").write_bytes(b'{"format": 1, "facts": ' + b"[" * 100_000)
    with pytest.raises(DumpError, match=r"dump\.json is torn, or none of ours: .*recursion"):
        dump.read(path)


def test_a_file_of_another_rank_or_format_is_refused(tmp_path: Path) -> None:
    path = dump.write(tmp_path, diverged(), None)
    (path / "rank_0.msgpack").rename(path / "rank_1.msgpack")
    with pytest.raises(DumpError, match=r"rank_1.msgpack is not a dump of rank 1"):
        dump.read(path)
    whole = msgspec.json.decode((path / "dump.json").read_bytes())
    (path / "dump.json").write_bytes(msgspec.json.encode(whole | {"format": 9}))
    with pytest.raises(DumpError, match="is of format 9"):
        dump.read(path)


def test_the_oldest_go(tmp_path: Path) -> None:
    look = diverged()
    (tmp_path / "notes.txt").write_text("not ours")
    paths = [dump.write(tmp_path, look, None) for _ in range(dump.MOST_DUMPS + 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(path.name for path in paths[2:]), "notes.txt"]
    newest = dump.read(tmp_path)
    assert newest.notes[0].endswith(f"the newest of {dump.MOST_DUMPS} dumps in {tmp_path}: {paths[-1].name}")


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".partial-old").mkdir()
    (tmp_path / ".partial-young").mkdir()
    os.utime(tmp_path / ".partial-old", (1, 1))
    dump.write(tmp_path, diverged(), None)
    assert [path.name for path in tmp_path.glob(".partial-*")] == [".partial-young"]


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    look = diverged()
    verdict = judge(look)
    assert verdict is not None
    monkeypatch.setattr(Path, "write_bytes", full)
    with dump.Dumper(dump.DumpOrder(directory=str(tmp_path))) as dumper:
        dumper.take(look, verdict)
    assert f"{tmp_path} cannot be written: No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_hangs_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: goes_on.wait(60.0))
    monkeypatch.setattr(dump, "DEADLINE_S", 0.05)
    look = diverged()
    verdict = judge(look)
    assert verdict is not None
    with dump.Dumper(dump.DumpOrder(directory=str(tmp_path))) as dumper:
        dumper.take(look, verdict)
        dumper.take(look, verdict)
    goes_on.set()
    assert "the last one is still being written" in caplog.text and "was not written within" in caplog.text


def test_a_dumper_writes_what_it_is_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    look = diverged()
    verdict = judge(look)
    assert verdict is not None
    with caplog.at_level(logging.INFO, "phalanx.ledger"), dump.Dumper(dump.DumpOrder(directory=str(tmp_path))) as one:
        one.take(look, verdict)
    assert dump.read(tmp_path).verdict == verdict and f"phalanx trace {tmp_path}" in caplog.text
    with dump.Dumper(None) as none:
        none.take(look, verdict)


def test_a_watcher_dumps_what_it_finds(tmp_path: Path) -> None:
    names, ranks = ("", "tp@0"), (0, 1, 2)
    with ExitStack() as stack:
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in ranks]
        for rank, segment in enumerate(segments):
            journal = Journal(segment.buf, epoch=1)
            journal.begin_step(1, 7, num_tokens=1)
            group_notes(1, journal, None).issue(Named(7 if rank else 9))
        watched = [
            WatchedRank(rank=rank, node="here", groups=names, journal=segment.handle)
            for rank, segment in enumerate(segments)
        ]
        order = dump.DumpOrder(directory=str(tmp_path))
        watching = Watching(WatchOrder(ranks=tuple(watched), groups={"tp@0": ranks}, dump=order), lambda: None)
        stack.callback(watching.close)
        verdict = watching.await_verdict(30.0)
    found = dump.read(tmp_path)  # the watcher has ended, so the dump is there
    assert verdict is not None and found.verdict == verdict and verdict.culprits == (0,)
    assert [one.entries.records[-1].digest for one in found.look.ranks.values()] == [9, 7, 7]


def test_what_the_configuration_orders(tmp_path: Path) -> None:
    assert dump_order(Config.build(model="m")) is None
    order = dump_order(Config.build(model="m", ledger_dump=str(tmp_path / "d"), tensor_parallel_size=2))
    assert order is not None and order.directory == str(tmp_path / "d") and (tmp_path / "d").is_dir()
    assert order.settings == {"model": "m", "ledger_dump": str(tmp_path / "d"), "tensor_parallel_size": "2"}


def test_a_directory_that_cannot_be_written_is_the_user_s_mistake(tmp_path: Path) -> None:
    dump.prepare(str(tmp_path / "new" / "one"))
    assert list((tmp_path / "new" / "one").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="ledger_dump"):
        dump.prepare(str(tmp_path / "file"))
