"""Quantised checkpoints give the model whose weights are their numbers, whatever part of them a rank reads."""

from __future__ import annotations

import json
from collections.abc import Callable
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
GROUP = 16
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
W4A16 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}


def compressed_config(*, weights: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    group = {"weights": {**W4A16, **(weights or {})}, "targets": ["Linear"], "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return config | settings


class Quantised:
    """Numbers, zero points and scales of a matrix, and the matrix that they stand for."""

    def __init__(self, weight_OI: Tensor, group_I: list[int]) -> None:
        zero_OG = torch.randint(3, 13, (len(weight_OI), max(group_I) + 1))
        self.scale_OG = (torch.rand(zero_OG.shape) * 0.05 + 0.02).half()
        scale_OI, zero_OI = self.scale_OG.float()[:, group_I], zero_OG[:, group_I]
        number_OI = ((weight_OI / scale_OI).round() + zero_OI).clamp(0, 15).long()
        self.weight_OI = (number_OI - zero_OI) * scale_OI
        self.symmetric_OI = (number_OI - 8) * scale_OI
        self.number: list[list[int]] = number_OI.tolist()
        self.zero: list[list[int]] = zero_OG.tolist()


def pack(rows: list[list[int]], order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Eight numbers of a row in a word; the lowest bits hold number order[0] of the eight."""
    packed = []
    for row in rows:
        words = [sum(row[at + k] << (4 * place) for place, k in enumerate(order)) for at in range(0, len(row), 8)]
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def transpose(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def as_awq(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    found = Quantised(weight_OI, [i // GROUP for i in range(weight_OI.shape[1])])
    tensors = {
        "qweight": pack(transpose(found.number), order),
        "qzeros": pack(transpose(found.zero), order),
        "scales": found.scale_OG.T,
    }
    return {f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}, found.weight_OI


def as_compressed(
    stem: str, weight_OI: Tensor, *, group_size: int = GROUP, symmetric: bool = False, reordered: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    group_I = [i // group_size for i in range(weight_OI.shape[1])]
    if reordered:
        group_I = torch.tensor(group_I)[torch.randperm(len(group_I))].tolist()
    found = Quantised(weight_OI, group_I)
    tensors = {
        "weight_packed": pack(found.number),
        "weight_scale": found.scale_OG,
        "weight_shape": torch.tensor(weight_OI.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(transpose(found.zero)).T
    if reordered:
        tensors["weight_g_idx"] = torch.tensor(group_I, dtype=torch.int32)
    weight_OI = found.symmetric_OI if symmetric else found.weight_OI
    return {f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}, weight_OI


def as_ordered_after_all(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    tensors, weight_OI = as_compressed(stem, weight_OI)
    order_I = torch.full((weight_OI.shape[1],), -1, dtype=torch.int32)
    return {**tensors, f"{stem}.weight_g_idx": order_I}, weight_OI


def as_channels(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return as_compressed(stem, weight_OI, group_size=weight_OI.shape[1])


Quantise = Callable[..., tuple[dict[str, Tensor], Tensor]]


def quantise_checkpoint(path: Path, plain: Path, quantise: Quantise, config: dict[str, Any]) -> None:
    """Quantise the linear layers in `path`, but for routers and the head; `plain` gets what they then stand for."""
    torch.manual_seed(1)
    tensors, plain_tensors = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj") or stem.rpartition(".")[2] in ("w1", "w2", "w3"):
            parts, plain_tensors[name] = quantise(stem, tensor)
            tensors |= parts
        else:
            tensors[name] = plain_tensors[name] = tensor
    settings = json.loads((path / "config.json").read_text())
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    save(path, tensors)
    save(plain, plain_tensors)


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, path / "model.safetensors", metadata={"format": "pt"})


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
