"""Models by their names on the hub: what is asked for, and how far it is said to be. No network."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import DryRunError

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models import hub
from phalanx.models.checkpoint import resolve
from phalanx.testing.checkpoints import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MIB = 1 << 20

State = tuple[str, int, int]


class FakeHub:
    """`snapshot_download` of a hub that has one model, with `sizes` of files that are still to come.

    Bars are made and moved as huggingface_hub 2.4 does it.
    """

    def __init__(self, directory: Path, sizes: Sequence[int] = ()) -> None:
        self.directory = directory
        self.sizes = sizes
        self.is_reachable = True
        self.pause_s = 0.0
        self.asked: list[dict[str, Any]] = []

    def snapshot_download(self, name: str, **options: Any) -> Any:
        self.asked.append({**options, "name": name})
        if options["dry_run"]:
            if not self.is_reachable:
                raise DryRunError("Dry run cannot be performed")
            there = SimpleNamespace(file_size=7, will_download=False)
            return [there, *(SimpleNamespace(file_size=size, will_download=True) for size in self.sizes)]
        if options["allow_patterns"] != ["config.json"] and self.sizes:
            self._download(options["tqdm_class"])
        return str(self.directory)

    def _download(self, bar_class: Any) -> None:
        transferred = bar_class(desc="Downloading bytes", disable=None, name="t", total=0, initial=0, unit="B")
        written = bar_class(desc="Reconstructing", disable=None, name="w", total=0, initial=0, unit="B")
        with bar_class(desc="Fetching files", total=len(self.sizes)) as files:
            threads = [threading.Thread(target=self._fetch, args=(size, transferred, written)) for size in self.sizes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
                files.update(1)
        transferred.set_description_str("Download complete")

    def _fetch(self, size: int, transferred: Any, written: Any) -> None:
        written.total += size
        written.refresh()
        for _ in range(8):
            time.sleep(self.pause_s)
            transferred.update(size // 10)  # compressed
            written.update(size // 8)
            written.set_postfix_str(str(written.format_dict.get("rate")), refresh=False)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "snapshots" / COMMIT, "qwen3")


@pytest.fixture
def fake(directory: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(directory)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def ask(**options: Any) -> list[State]:
    seen: list[State] = []
    resolve("someone/model", progress=lambda *state: seen.append(state), **options)
    return seen


def test_a_model_in_the_cache_is_found_by_its_name(fake: FakeHub, directory: Path) -> None:
    checkpoint = resolve("someone/model", revision="v2")
    assert (checkpoint.name, checkpoint.path) == ("someone/model", directory)
    assert {asked["name"] for asked in fake.asked} == {"someone/model"}


def test_a_branch_is_looked_up_once(fake: FakeHub) -> None:
    """It may move on between config.json and the weights."""
    ask(revision="v2")
    assert [asked["revision"] for asked in fake.asked] == ["v2", COMMIT, COMMIT]


def test_where_there_is_nothing_to_download_nothing_is_counted(fake: FakeHub) -> None:
    assert ask() == [("downloading", 0, 0)]


def test_a_download_tells_how_many_bytes_of_how_many_are_there(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "REPORT_INTERVAL_S", 0.0)
    fake.sizes = [8 * MIB, 16 * MIB, 24 * MIB]
    seen = ask()
    assert seen[:2] == [("downloading", 0, 0), ("downloading", 0, 48 * MIB)], "the whole, before anything has come"
    done = [state[1] for state in seen[1:]]
    assert done == sorted(done)
    assert len(set(done)) > 20
    assert seen[-1] == ("downloading", 48 * MIB, 48 * MIB)
    assert {state[2] for state in seen[1:]} == {48 * MIB}
    assert capfd.readouterr().err == "", "the hub's own bars would spoil the display"


def test_progress_is_told_by_one_thread_at_a_time_and_not_for_every_chunk(fake: FakeHub) -> None:
    fake.sizes, fake.pause_s = [8 * MIB] * 8, 0.02
    busy, most, num_told = 0, 0, 0

    def note(*_: object) -> None:
        nonlocal busy, most, num_told
        busy += 1
        most, num_told = max(most, busy), num_told + 1
        time.sleep(0.001)
        busy -= 1

    resolve("someone/model", progress=note)
    assert most == 1
    assert num_told < 32, "of 128 updates within 0.2 s"


def test_bytes_that_are_not_counted_are_a_sign_of_life(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answered no more when the total was asked for, but its files come."""
    monkeypatch.setattr(hub, "REPORT_INTERVAL_S", 0.0)
    fake.sizes, fake.is_reachable = [8 * MIB], False
    seen = ask()
    assert len(seen) >= 8
    assert set(seen) == {("downloading", 0, 0)}


def test_a_file_that_is_begun_again_takes_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "REPORT_INTERVAL_S", 0.0)
    seen: list[State] = []
    bar = hub._bar_class(hub._Meter(lambda *state: seen.append(state), 100).note)(total=0, unit="B")
    for num_bytes in (40, -40, 30, 30, 50):
        bar.update(num_bytes)
    assert [done for _, done, _ in seen] == [0, 40, 40, 40, 60, 100]


def test_a_model_that_cannot_run_is_refused_before_its_weights_come(fake: FakeHub, directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="someone/model is a MambaForCausalLM"):
        ask()
    assert [asked["allow_patterns"] for asked in fake.asked] == [["config.json"]]


def test_offline_it_is_said_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not a file or directory here, and HF_HUB_OFFLINE is set"):
        resolve("someone/no-such-model")


def test_a_name_that_no_hub_model_can_have() -> None:
    with pytest.raises(CheckpointError, match="cannot be the name of a hub model"):
        resolve("what is this")


@pytest.mark.parametrize(
    ("path", "commit"),
    [(f"/c/models--a--b/snapshots/{COMMIT}", COMMIT), (f"/c/{COMMIT}", None), ("/c/snapshots/main", None)],
)
def test_the_cache_tells_the_commit(path: str, commit: str | None) -> None:
    assert hub.commit_of(Path(path)) == commit
