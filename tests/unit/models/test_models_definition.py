"""Definitions take no memory, and what is not known about them is an error with its name."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.attention import ATTENTION
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.models.definition import build
from phalanx.models.shards import Sharding
from phalanx.models.weight_files import TensorInfo
from phalanx.models.weights import find_sources
from phalanx.testing.checkpoints import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return resolve(str(write_checkpoint(tmp_path, "qwen3_moe")))


def test_parameters_are_on_the_meta_device_and_buffers_are_real(checkpoint: Checkpoint) -> None:
    definition = build(checkpoint, torch.bfloat16)
    matrices = [parameter for parameter in definition.parameters() if parameter.dim() > 1]
    assert all(parameter.dtype == torch.bfloat16 for parameter in definition.parameters())
    assert sum(parameter.device.type == "meta" for parameter in matrices) >= 0.8 * len(matrices)
    frequencies = definition.get_buffer("model.rotary_emb.inv_freq")
    assert frequencies.dtype == torch.float32
    assert frequencies[0] == 1.0 and (frequencies[1:] < frequencies[:-1]).all()
    assert definition.config._attn_implementation == ATTENTION
    assert checkpoint.hf_config._attn_implementation != ATTENTION, "the checkpoint's own configuration stays as it is"
    assert torch.get_default_dtype() == torch.float32


def test_a_model_larger_than_memory_is_built(checkpoint: Checkpoint) -> None:
    file = checkpoint.path / "config.json"
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    large |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "head_dim": 128}
    file.write_text(json.dumps({**checkpoint.settings, **large, "vocab_size": 128256}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    definition = build(Checkpoint(checkpoint.path, "large"), torch.bfloat16)
    assert sum(parameter.numel() for parameter in definition.parameters()) > 70e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("style", ["diagonalwise", "rowwise_rep"])
def test_an_unknown_style_is_named(checkpoint: Checkpoint, style: str) -> None:
    definition = build(checkpoint, torch.float32)
    definition.config.base_model_tp_plan = {"layers.*.self_attn.q_proj": style}
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(UnsupportedModelError, match=f"plans {name} as '{style}'"):
        Sharding(definition, 0, 2).shard(name, definition.get_parameter(name))


def test_query_heads_that_no_kv_head_serves_are_the_checkpoints_fault(checkpoint: Checkpoint) -> None:
    definition = build(checkpoint, torch.float32)
    definition.config.num_key_value_heads = 3
    with pytest.raises(CheckpointError, match="8 query heads and 3 KV heads"):
        Sharding(definition, 0, 1)


def test_an_unknown_conversion_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping

    class Transpose:
        pass

    transform = SimpleNamespace(
        rename_source_key=lambda key: (key, "weight"), operations=[Transpose()], source_patterns=["weight"]
    )
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [transform])
    tensors = {"model.norm.weight": TensorInfo(checkpoint.path / "model.safetensors", "F32", (72,), 0, 288)}
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is converted by Transpose"):
        find_sources(None, tensors, ["model.norm.weight"])


def test_a_configuration_that_transformers_refuses_is_the_checkpoints_fault(checkpoint: Checkpoint) -> None:
    file = checkpoint.path / "config.json"
    file.write_text(json.dumps({**checkpoint.settings, "hidden_size": "wide"}))
    with pytest.raises(CheckpointError, match=r"config\.json is not accepted by transformers"):
        Checkpoint(checkpoint.path, "odd").hf_config
