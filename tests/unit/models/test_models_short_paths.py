"""The parts that are exchanged compute what transformers' own do. Whole models are compared in test_models_forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from torch import nn

from phalanx.models.checkpoint import resolve
from phalanx.models.definition import build
from phalanx.models.short_paths import GatedMLP, RMSNorm, RotaryEmbedding, SelfAttention, install_short_paths
from phalanx.testing.checkpoints import FAMILIES, write_checkpoint
from phalanx.testing.thread_group import ThreadGroup


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    theirs: Any = LlamaRMSNorm(72, eps=1e-5).to(dtype)
    theirs.weight.data.normal_()
    ours = RMSNorm(theirs.weight, theirs.variance_epsilon)
    x = torch.randn(3, 5, 72).to(dtype) * 20
    before = x.clone()
    spacing = torch.finfo(dtype).eps  # another order of summation may turn a rounding
    torch.testing.assert_close(ours(x), theirs(x), rtol=2 * spacing, atol=2 * spacing)
    assert torch.equal(x, before)


@pytest.mark.parametrize("family", [*FAMILIES, "glm4_moe"])
def test_every_usual_family_has_the_short_paths(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family)
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    decoder = paged.load(path, group)._decoder
    assert isinstance(decoder.norm, RMSNorm) and isinstance(decoder.rotary_emb, RotaryEmbedding)
    for layer in decoder.layers:
        assert isinstance(layer.self_attn, SelfAttention)
        assert isinstance(layer.input_layernorm, RMSNorm) and isinstance(layer.post_attention_layernorm, RMSNorm)
        assert isinstance(layer.mlp, GatedMLP) or "moe" in family or family == "mixtral"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "deepseek_v3", "minimax_m2"])
def test_norms_and_mlps_have_them_beside_attention_that_has_not(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family)
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    decoder = paged.load(path, group)._decoder
    assert isinstance(decoder.norm, RMSNorm) and not isinstance(decoder.rotary_emb, RotaryEmbedding)
    mlps = [module for module in decoder.modules() if hasattr(module, "gate_proj")]
    assert all(isinstance(module, GatedMLP) for module in mlps)


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe", "olmoe", "minimax_m2"])
def test_names_of_parameters_stay(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family)
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    before = set(dict(build(resolve(str(path)), torch.float32).named_parameters()))
    found = set(paged.load(path, group).named_parameters())
    assert {name for name in found if "correction_bias" not in name} == before


def test_attention_of_an_unknown_class_is_left_alone(tmp_path: Path) -> None:
    definition = build(resolve(str(write_checkpoint(tmp_path, "llama"))), torch.float32)

    class OtherAttention(nn.Module):
        layer_idx = 0

    definition.model.layers[0].self_attn = OtherAttention()
    rotary, attention = definition.model.rotary_emb, definition.model.layers[1].self_attn
    install_short_paths(definition)
    assert definition.model.rotary_emb is rotary and definition.model.layers[1].self_attn is attention
