"""A directory is replaced whole, and only if it is a checkpoint."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.errors import CheckpointError
from phalanx.models.sole_writer import sole_writer
from phalanx.models.whole_directory import prepare_target, whole_directory

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from phalanx.models.whole_directory import whole_directory
step, calls = int(sys.argv[2]), []
def kill(call, *arguments, **options):
    calls.append(call)
    if len(calls) == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments, **options)
os.rename, os.unlink = (lambda *a, call=call, **o: kill(call, *a, **o) for call in (os.rename, os.unlink))
with whole_directory(Path(sys.argv[1]), overwrite=True) as new:
    (new / "config.json").write_text("new")
    (new / "model.safetensors").write_text("new")
"""


def put_checkpoint(target: Path, word: str = "old") -> None:
    target.mkdir(exist_ok=True)
    (target / "additional_chat_templates").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"):
        (target / name).write_text(word)


def replace(target: Path, word: str) -> None:
    prepare_target(target, overwrite=True)
    with whole_directory(target, overwrite=True) as new:
        (new / "config.json").write_text(word)


def put_file(target: Path) -> None:
    target.write_text("mine")


def put_other_files(target: Path) -> None:
    target.mkdir()
    (target / "notes.txt").write_text("mine")


def put_files_beside_a_checkpoint(target: Path) -> None:
    put_checkpoint(target)
    for number in range(5):
        (target / f"notes-{number}.txt").write_text("mine")


def put_a_repository(target: Path) -> None:
    put_checkpoint(target)
    (target / ".git").mkdir()


def put_files_among_chat_templates(target: Path) -> None:
    put_checkpoint(target)
    (target / "additional_chat_templates" / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("put", "complaint"),
    [
        (put_file, r"target is not a directory"),
        (put_other_files, r"target is not replaced.* it has no config\.json, and it holds notes\.txt$"),
        (put_files_beside_a_checkpoint, r": it holds notes-0\.txt, notes-1\.txt, notes-2\.txt and 2 more$"),
        (put_a_repository, r": it holds \.git/$"),
        (put_files_among_chat_templates, r": it holds additional_chat_templates/notes\.txt$"),
    ],
)
def test_nothing_but_a_checkpoint_is_ever_replaced(tmp_path: Path, put: Callable[[Path], None], complaint: str) -> None:
    target = tmp_path / "target"
    put(target)
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=complaint if overwrite else "not empty|not a directory"):
            prepare_target(target, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "target")
    replace(tmp_path / "target", "new")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (1, "old"),  # before the old one is renamed
        (2, "old"),  # when it was: nothing has the name
        (3, "new"),  # when the new one has the name, before the old one is removed
        (4, "new"),  # amid that
        (6, "new"),
    ],
)
def test_after_a_kill_the_next_run_finds_a_whole_checkpoint(tmp_path: Path, step: int, found: str) -> None:
    target = tmp_path / "target"
    put_checkpoint(target)
    done = subprocess.run([sys.executable, "-c", KILLED, target, str(step)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="not empty"):
        prepare_target(target, overwrite=False)
    assert {path.read_text() for path in target.rglob("*") if path.is_file()} == {found}
    assert not list(tmp_path.glob(".target.old-*"))
    replace(target, "newest")
    assert (target / "config.json").read_text() == "newest"


def test_one_writes_at_a_time(tmp_path: Path) -> None:
    """A second one would take what the first has just put aside for what a killed run has left."""
    target = tmp_path / "target"
    put_checkpoint(target)
    complaint = "target is just being written by another process$"
    with whole_directory(target, overwrite=True) as new:
        (new / "config.json").write_text("new")
        with pytest.raises(CheckpointError, match=complaint):
            prepare_target(target, overwrite=True)
        with pytest.raises(CheckpointError, match=complaint), whole_directory(target, overwrite=True):
            raise AssertionError("it has begun")
        replace(tmp_path / "another", "new")
    assert (target / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "target"]
    replace(target, "newest")
    assert (target / "config.json").read_text() == "newest"


def test_who_waited_for_a_lock_that_is_gone_locks_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flock = tmp_path / "target", fcntl.flock

    def removed_meanwhile(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".target.lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with sole_writer(target), pytest.raises(CheckpointError, match="another process"), sole_writer(target):
        raise AssertionError("there are two")
    assert not list(tmp_path.iterdir())


def test_what_comes_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (
        pytest.raises(CheckpointError, match="target is not empty"),
        whole_directory(target, overwrite=False) as new,
    ):
        (new / "config.json").write_text("new")
        put_checkpoint(target)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_others_have_is_left_alone(tmp_path: Path) -> None:
    names = (".target.old-mine", ".target.old-0123456", ".target2.old-01234567", "target.old-01234567")
    for name in names:
        put_checkpoint(tmp_path / name)
    (tmp_path / "target").write_text("a file")
    put_checkpoint(tmp_path / ".target.old-01234567", "the only one there is")
    with pytest.raises(CheckpointError, match="is not a directory"):
        prepare_target(tmp_path / "target", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("target", ".target.old-01234567", *names))
