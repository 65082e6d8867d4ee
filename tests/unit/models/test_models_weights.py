"""Ranks read the right parts of the right tensors, into the memory that they were given."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import resolve
from phalanx.models.model import WeightMemory, import_definition, load_model
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.thread_group import run_ranks

TOKEN_IDS = list(range(40))


def logits_of(path: Path, num_ranks: int = 1) -> Tensor:
    def run(group: Group) -> Tensor:
        run = paged.PagedRun(paged.load(path, group))
        sequence = paged.Sequence(TOKEN_IDS)
        run.step([(sequence, len(TOKEN_IDS))])
        return run.logits_of(sequence)

    return run_ranks(num_ranks, run)[-1]


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = path / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_sharded_checkpoint_gives_the_same_model(tmp_path: Path, num_ranks: int) -> None:
    from transformers import AutoModelForCausalLM

    whole = write_checkpoint(tmp_path / "whole", "qwen3_moe")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    torch.testing.assert_close(logits_of(tmp_path / "sharded", num_ranks), logits_of(whole, num_ranks), rtol=0, atol=0)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_may_be_fused_in_the_checkpoint_already(tmp_path: Path, family: str, num_ranks: int) -> None:
    from transformers import AutoModelForCausalLM

    path = write_checkpoint(tmp_path, family)
    expected = logits_of(path, num_ranks)
    fused = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    rewrite(path, lambda tensors: fused)
    torch.testing.assert_close(logits_of(path, num_ranks), expected, rtol=0, atol=0)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()},
        lambda tensors: {**{k: v for k, v in tensors.items() if k != EMBEDDING}, HEAD: tensors[EMBEDDING]},
    ],
    ids=["stored twice", "stored as the head"],
)
def test_a_tied_head_costs_no_memory(tmp_path: Path, change: Any) -> None:
    path = write_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    (plain,) = run_ranks(1, lambda group: paged.load(path, group))
    expected = logits_of(path)
    rewrite(path, change)
    (model,) = run_ranks(1, lambda group: paged.load(path, group))
    assert model.weight_bytes == plain.weight_bytes
    torch.testing.assert_close(logits_of(path), expected, rtol=0, atol=0)


def test_a_head_of_its_own_is_believed_over_the_configuration(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    expected = logits_of(path)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    torch.testing.assert_close(logits_of(path), expected, rtol=0, atol=0)


def test_weights_lie_in_the_memory_that_was_given(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral", vocab_size=263)
    (whole,) = load_recorded(path, 1)
    first, second = load_recorded(path, 2)
    assert whole.weight_bytes == sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert whole.weight_bytes < first.weight_bytes + second.weight_bytes < 1.1 * whole.weight_bytes


def load_recorded(path: Path, num_ranks: int) -> list[Any]:
    def run(group: Group) -> Any:
        given: dict[str, Tensor] = {}
        seen: list[tuple[int, int]] = []

        def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            assert name not in given
            given[name] = paged.nan_like(name, shape, dtype)
            return given[name]

        model = load_model(
            resolve(str(path)),
            dtype=torch.float32,
            device=paged.CPU,
            group=group,
            memory=WeightMemory(allocate),
            on_progress=lambda done, total: seen.append((done, total)),
        )
        assert sum(tensor.nbytes for tensor in given.values()) == model.weight_bytes
        assert not any(tensor.isnan().any() for tensor in given.values()), "all of it was written"
        assert seen == sorted(seen) and len(seen) == len(given)
        assert seen[-1] == (model.weight_bytes, model.weight_bytes)
        return model

    return run_ranks(num_ranks, run)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    rewrite(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name})
    with pytest.raises(CheckpointError, match=r"lacks 3 of the model's tensors: model\.layers\.1\.mlp"):
        logits_of(path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, "llama")
    rewrite(path, lambda tensors: {**tensors, name: tensors[name][:-1]})
    with pytest.raises(CheckpointError, match=f"{name} has shape .*configuration wants"):
        logits_of(path)


def test_a_header_that_contradicts_itself_is_the_files_fault(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    file = path / "model.safetensors"
    content = file.read_bytes()
    spoilt = content.replace(b'"shape":[72]', b'"shape":[71]', 1)
    assert spoilt != content
    file.write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        logits_of(path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "mixtral")
    missing = next(name for name in load_file(path / "model.safetensors") if ".experts.3." in name)
    rewrite(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != missing})
    with pytest.raises(CheckpointError, match=r"experts.*configuration wants"):
        logits_of(path)


def test_tensors_without_use_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path, "llama")
    rewrite(path, lambda tensors: {**tensors, "model.extra.weight": torch.zeros(3)})
    with caplog.at_level(logging.WARNING):
        logits_of(path)
    assert "no use for 1 tensors of its checkpoint: model.extra.weight" in caplog.text


def test_importing_the_definition_refuses_what_is_not_supported(tmp_path: Path) -> None:
    import_definition(str(write_checkpoint(tmp_path / "model", "qwen2")))
    with pytest.raises(CheckpointError):
        import_definition(str(tmp_path))
