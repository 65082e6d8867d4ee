"""`phalanx trace`: the culprit first, exit codes, and clear words for what is no dump."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ledger_ranks import WritingRank, look_at
from recorder import program, write

from phalanx.cli import main
from phalanx.ledger import dump
from phalanx.ledger.flight_recorder import PREFIX, read

REDUCE, GATHER = "all_reduce float32 [3, 72]", "all_gather float32 [3, 130]"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Rank 0 has gathered where its peers have summed up."""
    ranks = [WritingRank(rank, ["tp@0"]) for rank in range(3)]
    for rank in ranks:
        rank.begin(1)
        rank.issue("tp@0", REDUCE if rank.rank else GATHER)
    return dump.write(tmp_path / "dumps", look_at(ranks, {"tp@0": (0, 1, 2)}), None)


@pytest.fixture
def torch_s(tmp_path: Path) -> Path:
    """Rank 0 has not come to the last collective."""
    ranks = program(4)
    for rank in ranks[1:]:
        rank.collective("all_reduce", [8, 64], state="started")
    return write(tmp_path / "recorded", ranks)


def test_the_culprit_is_named_first(ours: Path, torch_s: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trace", str(ours)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"rank 0 on here issued {GATHER} where its peers issued {REDUCE} (step 1, sequence 1")
    assert out[-1] == "(from dumps of our ledger: 3 ranks, 1 group)"
    assert main.run(["trace", str(torch_s)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("rank 0 has not come to all_reduce float32 [8, 64]: the last that it issued there is")
    assert out[1:3] == ["  rank 0 issued its last from", "    train.py:12 in train"]
    assert out[3:5] == ["  rank 1 issued it from", "    train.py:13 in train"]


def test_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trace", str(write(tmp_path, program(2)))]) == 0
    assert capsys.readouterr().out.startswith("nothing is wrong\n")


def test_json(ours: Path, torch_s: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory, source in ((ours, "phalanx"), (torch_s, "flight recorder")):
        assert main.run(["trace", str(directory), "--json"]) == 3
        found = json.loads(capsys.readouterr().out)
        assert (found["source"], found["verdict"]["culprits"]) == (source, [0])
        assert found["missing"] == [] and found["text"].startswith("rank 0 ")


def test_a_missing_dump_is_said(torch_s: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (torch_s / f"{PREFIX}2").unlink()
    assert main.run(["trace", str(torch_s)]) == 3
    assert "note: there is no dump of rank 2\n" in capsys.readouterr().out


def test_other_formats(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline, recorded = tmp_path / "trace.json", tmp_path / "for torch"
    assert main.run(["trace", str(ours), "--perfetto", str(timeline), "--flight-recorder", str(recorded)]) == 3
    assert len(json.loads(timeline.read_text())["traceEvents"]) > 6
    assert sorted(read(recorded).ranks) == [0, 1, 2]
    assert main.run(["trace", str(recorded)]) == 3, "what we export we read as well"
    assert capsys.readouterr().out.splitlines()[-2].startswith("rank 0 issued all_gather")


def test_what_cannot_be_written(ours: Path, torch_s: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["trace", str(ours), "--perfetto", str(ours / "none" / "x")]) == 2
    assert "--perfetto: " in capsys.readouterr().err
    assert main.run(["trace", str(ours), "--flight-recorder", str(torch_s)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main.run(["trace", str(ours), "--flight-recorder", str(ours / "dump.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main.run(["trace", str(torch_s), "--flight-recorder", str(torch_s / "x")]) == 2
    assert "dumps of a Flight Recorder already" in capsys.readouterr().err


def test_what_is_no_dump(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (ours / "rank_1.msgpack").write_bytes(b"\x93")
    for directory, complaint in (
        ("none", "cannot be read: No such file or directory"),
        ("file", "cannot be read: Not a directory"),
        ("empty", "holds no dump: neither dump.json, nor files whose names end in a rank"),
        (str(ours), "rank_1.msgpack is torn"),
    ):
        assert main.run(["trace", str(tmp_path / directory)]) == 2
        err = capsys.readouterr().err
        assert complaint in err and err.count("\n") == 1, err
