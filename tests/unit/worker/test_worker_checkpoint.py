"""Where a rank finds the checkpoint: where the brain has it, or again by its name; and that all have the same."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import CheckpointError, DeadlineError
from phalanx.models.checkpoint import resolve
from phalanx.protocol.worker import FIRST_EPOCH, Progress
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.thread_exchange import ThreadExchange
from phalanx.worker import checkpoint as worker_checkpoint
from phalanx.worker.checkpoint import check_same_checkpoint, find_checkpoint
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec(checkpoint: Path, model: Path | str, *, rank: int = 0, **settings: Any) -> WorkerSpec:
    config = Config.build(model=str(model), **settings)
    ranks = tuple(range(config.parallel.world_size))
    return WorkerSpec(
        rank=rank,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=config,
        checkpoint=str(checkpoint),
        epoch=FIRST_EPOCH,
        groups=(GroupSpec("tp@0", "gloo", ranks, FIRST_EPOCH, timeout_s=0.2, join_timeout_s=0.2),),
        queue=None,
    )


def ignore(*_: object) -> None:
    """Progress that does not matter."""


def test_another_host_may_have_it_elsewhere(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "here")
    worker = Worker(spec(tmp_path / "where the brain has it", model), lambda _: None)
    assert worker._checkpoint.path == model


def test_a_host_that_has_it_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"on {os.uname().nodename}: .*there is no such file or directory"):
        Worker(spec(tmp_path / "a", tmp_path / "b"), lambda _: None)


class TestHub:
    """A hub whose model is not in this host's cache, or not all of it."""

    @pytest.fixture
    def asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        fetched = write_checkpoint(tmp_path / "fetched")
        asked: list[dict[str, Any]] = []

        def snapshot_download(name: str, **options: Any) -> Any:
            asked.append({**options, "name": name})
            if options["dry_run"]:
                return [SimpleNamespace(file_size=10, will_download=True)]
            if options["allow_patterns"] != ["config.json"]:
                options["tqdm_class"](unit="B", total=10).update(10)
            return str(fetched)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    def test_another_host_fetches_the_commit_that_the_brain_has(self, tmp_path: Path, asked: list[Any]) -> None:
        reported: list[Progress] = []
        Worker(spec(tmp_path / "snapshots" / COMMIT, "some/model", revision="v2"), reported.append)
        assert {options["revision"] for options in asked} == {COMMIT}
        assert Progress("downloading", 10, 10) in reported

    def test_a_download_that_was_broken_off_is_completed(self, tmp_path: Path, asked: list[Any]) -> None:
        partial = write_checkpoint(tmp_path / "snapshots" / COMMIT)
        (partial / "model.safetensors").unlink()
        assert find_checkpoint(spec(partial, "some/model"), ignore).path == tmp_path / "fetched"
        assert {options["revision"] for options in asked} == {COMMIT}

    def test_a_directory_that_the_user_named_is_not(self, tmp_path: Path, asked: list[Any]) -> None:
        partial = write_checkpoint(tmp_path / "snapshots" / COMMIT)
        (partial / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
            find_checkpoint(spec(partial, partial), ignore)
        assert not asked


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives the function that says which node the calling thread is on."""
    here = threading.local()
    monkeypatch.setattr(worker_checkpoint.os, "uname", lambda: SimpleNamespace(nodename=here.name))
    return lambda name: setattr(here, "name", name)


def compare(first: Path, second: Path, nodes: Callable[[str], None]) -> None:
    """As rank 1 on node-b, with `first` on node-a. Raises what rank 1 does."""

    def be(rank: int) -> None:
        nodes(f"node-{'ab'[rank]}")
        path = (first, second)[rank]
        two_hosts = spec(path, path, rank=rank, tensor_parallel_size=2)
        check_same_checkpoint(resolve(str(path)), two_hosts, exchanges[rank])

    exchanges = ThreadExchange.make(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(be, rank) for rank in (0, 1)]
    ranks[0].result()
    ranks[1].result()


def test_a_copy_on_the_other_node_will_do(tmp_path: Path, nodes: Callable[[str], None]) -> None:
    first = write_checkpoint(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    compare(first, tmp_path / "b", nodes)


def test_a_fine_tune_on_the_other_node_is_an_error_that_names_both(
    tmp_path: Path, nodes: Callable[[str], None]
) -> None:
    first, second = write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", seed=1)
    with pytest.raises(CheckpointError, match=f"rank 1 on node-b has .* in {second} than rank 0 on node-a in {first}"):
        compare(first, second, nodes)


def test_a_worker_compares_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", seed=1)
    exchanges = ThreadExchange.make(2)
    check_same_checkpoint(resolve(str(first)), spec(first, first, tensor_parallel_size=2), exchanges[0])
    worker = Worker(spec(second, second, rank=1, tensor_parallel_size=2), lambda _: None, exchanges[1])
    with pytest.raises(CheckpointError, match="the nodes have different models"):
        worker.load()


def test_a_first_rank_that_says_nothing_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a")
    silent = ThreadExchange.make(2)[1]
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for word of which weights it has from rank 0"):
        check_same_checkpoint(resolve(str(path)), spec(path, path, rank=1, tensor_parallel_size=2), silent)


def test_on_one_host_nothing_is_compared(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a")
    check_same_checkpoint(resolve(str(path)), spec(path, path), None)
