"""The stages of a pipeline, one after the other, compute what the whole model does, and hold no more than they need."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import CheckpointError
from phalanx.testing.checkpoints import FAMILIES, MIXTURES, write_checkpoint
from phalanx.testing.thread_group import run_ranks
from phalanx.topology.grid import Grid

NUM_LAYERS = 3
VARIED_LAYERS = ("tied", "windows on some layers", "experts on some layers")


def load_stages(path: Path, group: Group, num_stages: int) -> paged.Stages:
    grid = Grid(group.size, num_stages)
    spans = [grid.stage_layers(NUM_LAYERS, stage) for stage in range(num_stages)]
    return paged.Stages([paged.load(path, group, layers=span) for span in spans])


@cache
def logits_of_whole(path: Path, tp_size: int) -> list[list[Tensor]]:
    """By rank and sequence, computed once for all numbers of stages."""
    return run_ranks(tp_size, lambda group: paged.run_in_random_pieces(paged.load(path, group), seed=5))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES, *VARIED_LAYERS])
def test_stages_compute_what_the_whole_model_does(written: Any, name: str, num_stages: int, tp_size: int) -> None:
    path = written(name, num_hidden_layers=NUM_LAYERS)
    wholes = logits_of_whole(path, tp_size)
    staged = run_ranks(tp_size, lambda group: paged.run_in_random_pieces(load_stages(path, group, num_stages), seed=5))
    for whole, stages in zip(wholes, staged, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(stages, whole, strict=True)), "bit for bit"


def test_a_stage_holds_its_layers_and_no_others(written: Any) -> None:
    path = written("llama", num_hidden_layers=NUM_LAYERS)
    ((whole, stages),) = run_ranks(1, lambda group: (paged.load(path, group), load_stages(path, group, 3).stages))
    assert [len(stage.cache_layers) for stage in stages] == [1, 1, 1]
    assert sum(stage.weight_bytes for stage in stages) == whole.weight_bytes
    first, middle, last = stages
    embedding_bytes = 260 * 72 * 4
    assert first.weight_bytes - middle.weight_bytes == embedding_bytes
    assert last.weight_bytes - middle.weight_bytes == embedding_bytes + 72 * 4, "the head and the last norm"
    assert [(stage.is_first, stage.is_last) for stage in stages] == [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_weight_is_read_by_the_first_and_by_the_last_stage(tmp_path: Path, kept: str) -> None:
    path = write_checkpoint(tmp_path, tie_word_embeddings=True, num_hidden_layers=NUM_LAYERS)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tied = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: tied}, file, metadata={"format": "pt"})
    (stages,) = run_ranks(1, lambda group: load_stages(path, group, 2).stages)
    (whole,) = run_ranks(1, lambda group: paged.load(path, group, pack=False))  # packed, it is there twice
    assert [stage.weight_bytes for stage in stages] == [
        2 * (whole.weight_bytes - tied.nbytes - 72 * 4) // 3 + tied.nbytes,
        (whole.weight_bytes - tied.nbytes - 72 * 4) // 3 + tied.nbytes + 72 * 4,
    ]
    hidden_TD = torch.randn(4, 72)
    assert torch.equal(stages[1].logits(hidden_TD), hidden_TD @ tied.T)


def test_a_stage_does_not_complain_of_what_belongs_to_another(written: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = written("mixtral", num_hidden_layers=NUM_LAYERS)
    run_ranks(1, lambda group: load_stages(path, group, 2))
    assert caplog.messages == []


def test_a_stage_misses_only_its_own_tensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, num_hidden_layers=2)
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    grid = Grid(1, 2)
    run_ranks(1, lambda group: paged.load(path, group, layers=grid.stage_layers(2, 0)))
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's tensors: model\.layers\.1"):
        run_ranks(1, lambda group: paged.load(path, group, layers=grid.stage_layers(2, 1)))
