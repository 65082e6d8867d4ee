"""Quantised checkpoints give the model whose weights are their numbers, whatever part of them a rank reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.checkpoint import resolve
from phalanx.models.dequantise import read_quantised
from phalanx.models.quantisation import AWQ, PACK_QUANTIZED, QuantisedInfo, join_parts
from phalanx.models.weight_files import TensorInfo
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.quantised import (
    AWQ_CONFIG,
    Quantise,
    as_awq,
    as_compressed,
    compressed_config,
    quantise_checkpoint,
    save,
)
from phalanx.testing.thread_group import run_ranks
from phalanx.topology.sharding import Span

TOKEN_IDS = list(range(50))
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
}


def as_ordered_after_all(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    tensors, weight_OI = as_compressed(stem, weight_OI)
    order_I = torch.full((weight_OI.shape[1],), -1, dtype=torch.int32)
    return {**tensors, f"{stem}.weight_g_idx": order_I}, weight_OI


def as_channels(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return as_compressed(stem, weight_OI, group_size=weight_OI.shape[1])


def logits_of(path: Path, num_ranks: int) -> Tensor:
    def run(group: Group) -> Tensor:
        run = paged.PagedRun(paged.load(path, group))
        sequence = paged.Sequence(TOKEN_IDS)
        run.step([(sequence, 20)])
        run.step([(sequence, sequence.num_left)])
        return run.logits_of(sequence)

    return run_ranks(num_ranks, run)[-1]


FORMS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "awq": (as_awq, AWQ_CONFIG),
    "asymmetric": (as_compressed, compressed_config(weights={"symmetric": False})),
    "symmetric": (lambda *matrix: as_compressed(*matrix, symmetric=True), compressed_config()),
    "reordered": (lambda *matrix: as_compressed(*matrix, reordered=True), compressed_config()),
    "ordered after all": (as_ordered_after_all, compressed_config()),
    "by channel": (as_channels, compressed_config(weights={"strategy": "channel", "group_size": None})),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_the_numbers_stand_for_is_what_runs(tmp_path: Path, form: str) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", **SHAPE)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS[form])
    for num_ranks in (1, 2, 3):
        assert torch.equal(logits_of(path, num_ranks), logits_of(tmp_path / "plain", num_ranks))


@pytest.mark.parametrize("family", ["llama", "mixtral", "minimax_m2", "deepseek_v3", "glm4_moe", "olmoe"])
def test_names_that_families_convert(tmp_path: Path, family: str) -> None:
    latents = {"kv_lora_rank": 32, "q_lora_rank": 48, "v_head_dim": 16} if family == "deepseek_v3" else {}
    path = write_checkpoint(tmp_path / "model", family, **SHAPE, **latents)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS["asymmetric"])
    assert torch.equal(logits_of(path, 3), logits_of(tmp_path / "plain", 3))


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    path = write_checkpoint(tmp_path / "model", "gpt_oss", hidden_size=64, intermediate_size=96)
    tensors = load_file(path / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        code_EOGN = torch.randint(0, 16, (num_experts, num_outputs, num_inputs // 32, 32))
        scale_EOG = torch.randint(122, 126, code_EOGN.shape[:3])
        tensors[f"{name}_blocks"] = (code_EOGN[..., ::2] | code_EOGN[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = scale_EOG.to(torch.uint8)
        plain[name] = (values[code_EOGN] * 2.0 ** (scale_EOG - 127)[..., None]).flatten(2).transpose(1, 2)
    settings = json.loads((path / "config.json").read_text())
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", plain)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    save(path, tensors)
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "mxfp4"}}))
    for num_ranks in (1, 2, 3):
        assert torch.equal(logits_of(path, num_ranks), logits_of(tmp_path / "plain", num_ranks))


def test_parts_may_lie_in_several_files(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "llama", **SHAPE)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS["awq"])
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"{name.rpartition('.')[2]}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {file.name for file in resolve(str(path)).weight_files} == set(weight_map.values())
    assert torch.equal(logits_of(path, 2), logits_of(tmp_path / "plain", 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_run_chooses_the_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path / "model", "llama", **SHAPE)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS["asymmetric"])
    quantised, plain = (
        run_ranks(1, lambda group, path=path: paged.load(path, group, dtype, pack=False))[0].named_parameters()
        for path in (path, tmp_path / "plain")
    )
    for name, tensor in quantised.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, plain[name]), "rounded once"


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, suffix: str) -> None:
    path = write_checkpoint(tmp_path / "model", "llama", **SHAPE)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS["awq"])
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save(path, {key: tensor for key, tensor in load_file(path / "model.safetensors").items() if key != name})
    with pytest.raises(CheckpointError, match=f"lacks {name}, which belongs to a quantised matrix"):
        resolve(str(path))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_parts_that_do_not_fit_each_other_are_named(tmp_path: Path, suffix: str) -> None:
    path = write_checkpoint(tmp_path / "model", "llama", **SHAPE)
    quantise_checkpoint(path, tmp_path / "plain", *FORMS["asymmetric"])
    stem = "model.layers.0.mlp.up_proj"
    tensors = load_file(path / "model.safetensors")
    save(path, {**tensors, f"{stem}.{suffix}": tensors[f"{stem}.{suffix}"][:-8]})
    with pytest.raises(CheckpointError, match=f"the shapes of {stem}'s tensors do not fit each other"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("config", "odd"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, "unknown"),
        ({**AWQ_CONFIG, "bits": 8}, "awq, 8 bits"),
        ({**AWQ_CONFIG, "version": "gemv"}, "awq, version gemv"),
        (compressed_config(weights={"num_bits": 8}), "compressed-tensors, 8 bits of int"),
        (compressed_config(weights={"type": "float"}), "compressed-tensors, 4 bits of float"),
        (compressed_config(weights={"strategy": "block"}), "compressed-tensors, by block"),
        (compressed_config(format="nvfp4-pack-quantized"), "compressed-tensors, nvfp4-pack-quantized"),
        (compressed_config(format="float-quantized", config_groups={}), "compressed-tensors, float-quantized"),
        (compressed_config(kv_cache_scheme={"num_bits": 8}), "compressed-tensors, with a quantised KV cache"),
        (compressed_config(transform_config={"a": 1}), "compressed-tensors, with transforms"),
        (compressed_config(sparsity_config={"format": "sparse-24"}), "compressed-tensors, sparse: sparse-24"),
    ],
)
def test_any_other_quantisation_is_refused_by_name(tmp_path: Path, config: dict[str, Any], odd: str) -> None:
    path = write_checkpoint(tmp_path, "llama")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"x": 1, **config}}))
    with pytest.raises(UnsupportedModelError, match=rf"is quantised \({odd}\); supported are .* AWQ in 4 bits"):
        resolve(str(path))


def test_a_quantisation_that_makes_no_sense_is_the_checkpoints_fault(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": {**AWQ_CONFIG, "bits": "x"}}))
    with pytest.raises(CheckpointError, match=r"quantization_config: Expected `int \| null`"):
        resolve(str(path))


@pytest.mark.parametrize("form", ["awq", "asymmetric"])
def test_no_more_is_read_than_a_part_needs(form: str) -> None:
    tensors, expected_OI = FORMS[form][0]("layer", torch.randn(32, 64))
    headers = {
        name: TensorInfo(Path("file"), "I32", tuple(tensor.shape), 0, tensor.nbytes) for name, tensor in tensors.items()
    }
    (info,) = join_parts(headers, AWQ if form == "awq" else PACK_QUANTIZED).values()
    assert isinstance(info, QuantisedInfo)
    read: dict[str, int] = {}

    class Slices:
        def __init__(self, suffix: str) -> None:
            self.suffix = suffix

        def __getitem__(self, index: Any) -> Tensor:
            part = tensors[f"layer.{self.suffix}"][index]
            read[self.suffix] = part.numel()
            return part

    found_OI = read_quantised(info, Slices, Span(8, 16), Span(24, 40))
    assert torch.equal(found_OI, expected_OI[8:16, 24:40])
    numbers, zeros, scales = (8 * 16 // 8, 2, 8 * 2)
    assert sorted(read.values()) == sorted((numbers, zeros, scales)), "words of numbers, of zero points, scales"
