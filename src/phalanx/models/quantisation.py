"""What a quantised checkpoint's config.json says, and which tensors make up each of its matrices. No torch here.

Three layouts of 4-bit numbers are known. They are dequantised while they are read, but for experts on a GPU
(four_bit_experts.py):

- `awq` (AutoAWQ's "gemm"): for a layer, `qweight` [inputs, outputs / 8], `qzeros` [groups, outputs / 8] and `scales`
  [groups, outputs]. Source: github.com/casper-hansen/AutoAWQ, awq/utils/packing_utils.py.
- `pack-quantized` (compressed-tensors, "W4A16"): `weight_packed` [outputs, inputs / 8], `weight_scale`
  [outputs, groups], and where they are asymmetric `weight_zero_point` [outputs / 8, groups]; `weight_g_idx` [inputs]
  where groups are not consecutive inputs. Source: github.com/vllm-project/compressed-tensors, pack_quantized.py.
- `mxfp4` (gpt-oss), of all experts together: `blocks` [experts, outputs, groups, 16] and `scales`
  [experts, outputs, groups], of groups of 32 inputs.

Otherwise a matrix is one layer's. A group of consecutive inputs has a scale and a zero point of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.weight_files import DTYPES, TensorInfo

SUPPORTED = "AWQ in 4 bits (version gemm), compressed-tensors in 4 bits (pack-quantized, by group or channel), MXFP4"

AWQ = "awq"
PACK_QUANTIZED = "pack-quantized"
MXFP4 = "mxfp4"

INT4 = (AWQ, PACK_QUANTIZED)
"""Those of whole numbers with a zero point and a scale for each group."""

PER_WORD = 8
"""Numbers of 4 bits in an int32."""

_BLOCK_BYTES = 16
"""Of a group in MXFP4: two numbers in each byte."""

_SUFFIXES = {
    AWQ: ("qweight", "qzeros", "scales"),
    PACK_QUANTIZED: ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
"""Last parts of the tensors' names; the first has the numbers themselves."""


class QuantisedInfo(NamedTuple):
    """A matrix in 4 bits. Its first fields are like the TensorInfo of the matrix that it stands for."""

    file: Path
    dtype: str
    """Of its scales; of what it was made from, where that says nothing."""
    shape: tuple[int, ...]
    """[outputs, inputs], but for MXFP4 [inputs, outputs], as gpt-oss has its experts."""
    layout: str
    stem: str
    """What the names of its parts begin with."""
    parts: dict[str, TensorInfo]
    """Its tensors, by what their names end with."""
    group_size: int
    """Inputs of a group."""
    parameter: str | None = None
    """The fused parameter that it is a part of, if its tensors are those of all experts."""
    expert: int | None = None
    """Which of them it is."""


StoredTensor = TensorInfo | QuantisedInfo


class _Args(msgspec.Struct):
    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None


class _Group(msgspec.Struct):
    weights: _Args | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Sparsity(msgspec.Struct):
    format: str = "dense"


class _Config(msgspec.Struct):
    """quantization_config of either method."""

    quant_method: str = "unknown"
    bits: int | None = None
    version: str | None = None
    format: str | None = None
    config_groups: dict[str, _Group] = {}
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: _Sparsity | None = None
    transform_config: dict[str, Any] | None = None


def layout_of(model: str, quantization_config: Mapping[str, Any]) -> str:
    """The layout that quantization_config describes.

    Raises UnsupportedModelError for any other, CheckpointError if it makes no sense.
    """
    try:
        config = msgspec.convert(dict(quantization_config), _Config)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{model}: quantization_config: {error}") from error
    if config.quant_method == "mxfp4":
        return MXFP4
    if config.quant_method == "awq":
        layout, odd = AWQ, _odd_in_awq(config)
    elif config.quant_method == "compressed-tensors":
        layout, odd = PACK_QUANTIZED, _odd_in_compressed_tensors(config)
    else:
        layout, odd = "", config.quant_method
    if odd:
        raise UnsupportedModelError(
            f"{model} is quantised ({odd}); supported are {', '.join(DTYPES.values())}, GGUF files, {SUPPORTED}"
        )
    return layout


def _odd_in_awq(config: _Config) -> str | None:
    version = (config.version or config.format or "gemm").lower()
    if config.bits not in (None, 4):
        return f"awq, {config.bits} bits"
    return None if version == "gemm" else f"awq, version {version}"


def _odd_in_compressed_tensors(config: _Config) -> str | None:
    method = "compressed-tensors"
    if not config.config_groups and config.format not in (None, "dense", PACK_QUANTIZED):
        return f"{method}, {config.format}"
    for group in config.config_groups.values():
        layout, weights = group.format or config.format, group.weights
        if layout != PACK_QUANTIZED:
            return f"{method}, {layout}"
        if group.input_activations or group.output_activations:
            return f"{method}, with quantised activations"
        if weights is None or (weights.num_bits, weights.type) != (4, "int"):
            return f"{method}, {weights.num_bits} bits of {weights.type}" if weights else f"{method}, without weights"
        if weights.strategy not in ("group", "channel"):
            return f"{method}, by {weights.strategy}"
    if config.kv_cache_scheme:
        return f"{method}, with a quantised KV cache"
    if config.transform_config:
        return f"{method}, with transforms"
    if config.sparsity_config and config.sparsity_config.format != "dense":
        return f"{method}, sparse: {config.sparsity_config.format}"
    return None


def join_parts(tensors: Mapping[str, TensorInfo], layout: str) -> dict[str, StoredTensor]:
    """The checkpoint's tensors by name, with one QuantisedInfo in place of the tensors that make up a matrix.

    Raises CheckpointError if one of these is missing or has a shape that does not fit the others.
    """
    if layout == MXFP4:
        return _join_experts(tensors)
    first, *others = _SUFFIXES[layout]
    joined: dict[str, StoredTensor] = {}
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == first:
            parts = {other: tensors[f"{stem}.{other}"] for other in (first, *others) if f"{stem}.{other}" in tensors}
            joined[f"{stem}.weight"] = _join(stem, layout, parts)
        elif suffix not in others or f"{stem}.{first}" not in tensors:
            joined[name] = info
    return joined


def _join_experts(tensors: Mapping[str, TensorInfo]) -> dict[str, StoredTensor]:
    joined: dict[str, StoredTensor] = {}
    for name, info in tensors.items():
        parameter = name.removesuffix("_blocks")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
            continue
        if parameter == name:
            joined[name] = info
            continue
        scales = tensors.get(f"{parameter}_scales")
        if scales is None or len(info.shape) != 4 or scales.shape != info.shape[:3] or info.shape[3] != _BLOCK_BYTES:
            raise CheckpointError(f"{info.file}: {name} is no MXFP4 of experts, or lacks the {parameter}_scales of it")
        num_experts, num_outputs, num_groups, _ = info.shape
        shape, parts = (num_groups * 2 * _BLOCK_BYTES, num_outputs), {"blocks": info, "scales": scales}
        for expert in range(num_experts):
            joined[f"{parameter}.{expert}"] = QuantisedInfo(
                info.file, "BF16", shape, MXFP4, f"{parameter}_", parts, 2 * _BLOCK_BYTES, parameter, expert
            )
    return joined


def _join(stem: str, layout: str, parts: dict[str, TensorInfo]) -> QuantisedInfo:
    numbers = parts[_SUFFIXES[layout][0]]
    scales_suffix = "scales" if layout == AWQ else "weight_scale"
    needed = (scales_suffix, "qzeros") if layout == AWQ else (scales_suffix,)
    for suffix in needed:
        if suffix not in parts:
            raise CheckpointError(f"{numbers.file} lacks {stem}.{suffix}, which belongs to a quantised matrix")
    scales = parts[scales_suffix]
    misshapen = f"{numbers.file}: the shapes of {stem}'s tensors do not fit each other"
    if any(len(part.shape) != 2 for part in (numbers, scales)):
        raise CheckpointError(misshapen)
    if layout == AWQ:
        num_inputs, num_outputs, num_groups = numbers.shape[0], numbers.shape[1] * PER_WORD, scales.shape[0]
    else:
        num_outputs, num_inputs, num_groups = numbers.shape[0], numbers.shape[1] * PER_WORD, scales.shape[1]
    if num_groups == 0 or num_inputs % num_groups:
        raise CheckpointError(misshapen)
    group_size = num_inputs // num_groups
    for suffix, shape in _expected_shapes(layout, num_outputs, num_inputs, num_groups):
        if suffix in parts and parts[suffix].shape != shape:
            raise CheckpointError(misshapen)
    return QuantisedInfo(numbers.file, scales.dtype, (num_outputs, num_inputs), layout, f"{stem}.", parts, group_size)


def _expected_shapes(
    layout: str, num_outputs: int, num_inputs: int, num_groups: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if layout == AWQ:
        yield "scales", (num_groups, num_outputs)
        yield "qzeros", (num_groups, num_outputs // PER_WORD)
    else:
        yield "weight_scale", (num_outputs, num_groups)
        yield "weight_zero_point", (-(-num_outputs // PER_WORD), num_groups)
        yield "weight_g_idx", (num_inputs,)
