"""Where a rank finds the checkpoint: where the brain has it, or again by the model's name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phalanx.config import Config
from phalanx.errors import CheckpointError
from phalanx.protocol import FIRST_EPOCH
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.worker.spec import WorkerSpec
from phalanx.worker.worker import Worker


def spec(checkpoint: Path, model: Path) -> WorkerSpec:
    return WorkerSpec(
        rank=0,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=Config.build(model=str(model)),
        checkpoint=str(checkpoint),
        epoch=FIRST_EPOCH,
        groups=(),
        queue=None,
    )


def test_another_host_may_have_it_elsewhere(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "here")
    worker = Worker(spec(tmp_path / "where the brain has it", model), lambda _: None)
    assert worker._checkpoint.path == model


def test_a_host_that_has_it_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"on {os.uname().nodename}: .*there is no such file or directory"):
        Worker(spec(tmp_path / "a", tmp_path / "b"), lambda _: None)
