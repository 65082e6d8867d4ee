"""Files of other programs: what is plain data is read, whatever is not is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from recorder import program, write

from phalanx.errors import DumpError
from phalanx.ledger import flight_recorder
from phalanx.ledger.flight_recorder import PREFIX, Entry, Recording, read


class Harm:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    harmed = tmp_path / "harmed"
    directory = write(tmp_path / "dumps", program(2))
    (directory / f"{PREFIX}1").write_bytes(pickle.dumps({"version": Harm(harmed)}, protocol=protocol))
    with pytest.raises(DumpError, match=rf"{PREFIX}1: the pickle asks for \w+\.mkdir: it is not loaded"):
        read(directory)
    assert not harmed.exists()


@pytest.mark.parametrize("kind", [set, bytearray, complex])
def test_classes_are_not_made_not_even_harmless_ones(tmp_path: Path, kind: type) -> None:
    (tmp_path / f"{PREFIX}0").write_bytes(pickle.dumps({"version": "2.10", "entries": kind()}, protocol=2))
    with pytest.raises(DumpError, match="the pickle asks for"):
        read(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, program(2)) / f"{PREFIX}1"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DumpError, match=f"{PREFIX}1 is torn"):
        read(tmp_path)


def entry(name: str) -> bytes:
    """A recording of this point-to-point operation alone."""
    one = Entry(
        record_id=0,
        process_group=("0", "default_pg"),
        collective_seq_id=0,
        profiling_name=name,
        time_created_ns=1,
        state="completed",
        is_p2p=True,
    )
    return msgspec.json.encode(Recording(version="2.10", entries=[one]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (pickle.dumps([1, 2]), "no dump of a Flight Recorder: Expected `object`"),
        (pickle.dumps({"entries": []}), "missing required field `version`"),
        (pickle.dumps({"version": "3.0", "entries": []}), "format '3.0'; 2.x is what can be read"),
        (b'{"version": "2.10", "entries": [{"record_id": 1}]}', "missing required field"),
        (b'{"version": "2.10", ', "torn"),
        (b'{"version": "2.10", "pg_config": {"0": {"name": "0", "ranks": "exit()"}}}', "malformed"),
        (b'{"version": "2.10", "pg_config": {"0": {"name": "0", "ranks": "[0, 1000000000]"}}}', "<= 999999"),
        (b'{"version": "2.10", "pg_config": {"0": {"name": "0", "ranks": "[-1]"}}}', ">= 0"),
        (b'{"version": ' + b"[" * 100_000, "torn, or is no dump of a Flight Recorder: .*recursion"),
        (entry("nccl:recv"), "'nccl:recv' of its entry 0 does not say between which ranks"),
        (entry("nccl:send 0->x"), "'nccl:send 0->x' of its entry 0 does not say"),
        (entry("nccl:send 0->1->2"), "'nccl:send 0->1->2' of its entry 0 does not say"),
    ],
)
def test_what_is_no_dump(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / f"{PREFIX}0").write_bytes(content)
    with pytest.raises(DumpError, match=f"(?s){PREFIX}0.*{complaint}"):
        read(tmp_path)


def test_files_of_two_runs(tmp_path: Path) -> None:
    write(tmp_path, program(2))
    (tmp_path / "other_0").write_bytes(b"")
    with pytest.raises(DumpError, match=r"other_0 are both of rank 0|both of rank 0"):
        read(tmp_path)
    (tmp_path / "other_0").rename(tmp_path / "other_7")
    with pytest.raises(DumpError, match="files of several kinds"):
        read(tmp_path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read(write(tmp_path / "here", program(2)))
    flight_recorder.write(tmp_path / "there", found.ranks)
    assert read(tmp_path / "there").ranks == found.ranks
    with pytest.raises(DumpError, match="is not empty"):
        flight_recorder.write(tmp_path / "there", found.ranks)
