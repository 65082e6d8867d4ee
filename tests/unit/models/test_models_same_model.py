"""Whether weights can take the place of others, and what is told where they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import resolve
from phalanx.models.same_model import check_same_model


def test_another_training_of_the_same_model(written: Callable[..., Path]) -> None:
    check_same_model(resolve(str(written("llama"))), resolve(str(written("llama", seed=1))))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rope_theta": 5e5}, "config.json has rope_parameters"),
        ({"intermediate_size": 104}, r"mlp.down_proj.weight is F32 \[72, 104\], not F32 \[72, 96\]"),
        ({"num_hidden_layers": 3}, "a tensor model.layers.2.input_layernorm.weight, which is new"),
        ({"num_hidden_layers": 1}, "it lacks the tensor model.layers.1.input_layernorm.weight"),
        ({"dtype": "bfloat16"}, r"lm_head.weight is BF16 \[260, 72\], not F32 \[260, 72\]"),
    ],
)
def test_another_model(written: Callable[..., Path], more: dict[str, object], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        check_same_model(resolve(str(written("llama"))), resolve(str(written("llama", **more))))


def test_who_wrote_it_does_not_matter(written: Callable[..., Path], tmp_path: Path) -> None:
    before = written("llama")
    for file in before.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    settings = json.loads((before / "config.json").read_text()) | {"transformers_version": "1", "_name_or_path": "x"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_same_model(resolve(str(before)), resolve(str(tmp_path)))
