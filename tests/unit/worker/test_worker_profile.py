"""What the largest step takes is known before the cache is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phalanx.collectives.group import Group
from phalanx.config import SchedulerConfig
from phalanx.models.checkpoint import resolve
from phalanx.models.model import WeightMemory, load_model
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.thread_group import run_ranks
from phalanx.worker.profile import peak_activation_bytes

NUM_SEQS, VOCAB_SIZE = 64, 50_000
LOGITS_BYTES = NUM_SEQS * VOCAB_SIZE * 4


def measure(path: Path, device: torch.device) -> int:
    def run(group: Group) -> int:
        model = load_model(
            resolve(str(path)),
            dtype=torch.float32,
            device=device,
            group=group,
            memory=WeightMemory(lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)),
            on_progress=lambda done, total: None,
        )
        scheduler = SchedulerConfig(max_num_seqs=NUM_SEQS, max_num_batched_tokens=NUM_SEQS)
        return peak_activation_bytes(model, scheduler, block_size=16)

    return run_ranks(1, run)[0]


def test_a_cpu_is_not_measured(tmp_path: Path) -> None:
    assert measure(write_checkpoint(tmp_path), torch.device("cpu")) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_choosing_tokens_counts(tmp_path: Path) -> None:
    """The logits are kept for log-probabilities, turned into weights and sorted: that is more than the tiny model."""
    path = write_checkpoint(tmp_path, vocab_size=VOCAB_SIZE)
    assert measure(path, torch.device("cuda", 0)) > 5 * LOGITS_BYTES
