"""Tiny checkpoints in 4 bits, packed number by number, and what their numbers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
W4A16 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}

Quantise = Callable[..., tuple[dict[str, Tensor], Tensor]]
"""From a matrix and the stem of its name to the tensors that stand for it, and to what they stand for."""


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


def as_awq(stem: str, weight_OI: Tensor, *, group_size: int = GROUP) -> tuple[dict[str, Tensor], Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    found = Quantised(weight_OI, [i // group_size for i in range(weight_OI.shape[1])])
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


def quantise_checkpoint(path: Path, plain: Path, quantise: Quantise, config: dict[str, Any]) -> None:
    """Quantise the linear layers in `path`, but for routers and the head; `plain` gets what they then stand for."""
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    plain_tensors: dict[str, Tensor] = {}
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
