"""Which of a rank's experts' parameters stay in 4 bits in memory, and what takes each one's place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.models.quantisation import AWQ, INT4, QuantisedInfo, StoredTensor
from phalanx.models.shards import Shard
from phalanx.models.weight_files import DTYPES
from phalanx.models.weights import Source
from phalanx.moe.four_bits import RUN, FourBitWeight

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A tensor that takes, with others, the place of a parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Form(NamedTuple):
    """A parameter's shard in 4 bits."""

    shape: tuple[int, ...]
    """Of the shard dequantised: experts, outputs, inputs."""
    group_size: int
    """At most the checkpoint's: a shard's ends may cut its groups, which then become several."""
    scale_dtype: torch.dtype
    has_zeros: bool

    def parts(self, name: str) -> tuple[Part, ...]:
        """In the order of FourBitWeight."""
        num_experts, num_outputs, num_inputs = self.shape
        of_groups = (num_experts, num_inputs // self.group_size, num_outputs)
        numbers = Part(f"{name}_numbers", (num_experts, num_outputs, num_inputs // 2), torch.uint8)
        scales = Part(f"{name}_scales", of_groups, self.scale_dtype)
        zeros = (Part(f"{name}_zeros", of_groups, torch.int8),) if self.has_zeros else ()
        return (numbers, scales, *zeros)


def plan_four_bits(
    shards: Mapping[str, Shard], sources: Mapping[str, Sequence[Source]], tensors: Mapping[str, StoredTensor]
) -> dict[str, Form]:
    """The parameters that stay in 4 bits, by name: experts' matrices in AWQ or compressed-tensors.

    What of these cannot stay is dequantised, and one line in the log says why.
    """
    forms: dict[str, Form] = {}
    obstacles: dict[str, list[str]] = {}
    for name, shard in shards.items():
        infos = [tensors[source.key] for source in sources[name]]
        of_experts = sources[name][0].expert is not None
        if not of_experts or not any(_is_known(info) for info in infos):
            continue
        quantised = [info for info in infos if isinstance(info, QuantisedInfo) and _is_known(info)]
        if obstacle := _obstacle(shard, quantised, len(infos)):
            obstacles.setdefault(obstacle, []).append(name)
        else:
            forms[name] = _form(shard, quantised)
    if obstacles:
        log_dequantised("; ".join(f"{_some(names)} ({obstacle})" for obstacle, names in obstacles.items()))
    return forms


def log_dequantised(what: str) -> None:
    """That experts which could have stayed in 4 bits do not."""
    _log.warning("experts in 4 bits are dequantised, and take some four times the memory: %s", what)


def install_four_bits(definition: Any, name: str, parts: Sequence[Tensor]) -> FourBitWeight:
    """Have a module compute with these instead of a parameter of its own. They are in it, as parameters, already."""
    module_name, _, leaf = name.rpartition(".")
    module = definition.get_submodule(module_name)
    assert not module.is_transposed and not module.has_bias
    weight = FourBitWeight(*parts)
    delattr(module, leaf)
    setattr(module, leaf, weight)
    return weight


def _is_known(info: StoredTensor) -> bool:
    return isinstance(info, QuantisedInfo) and info.layout in INT4


def _obstacle(shard: Shard, infos: Sequence[QuantisedInfo], num_matrices: int) -> str | None:
    """Why a parameter cannot stay in 4 bits, and what would help."""
    first = infos[0]
    if len(infos) < num_matrices:
        return "some of these experts are not quantised"
    if any("weight_g_idx" in info.parts for info in infos):
        return "their groups are not of consecutive inputs: weight_g_idx"
    if any((info.group_size, _has_zeros(info)) != (first.group_size, _has_zeros(first)) for info in infos):
        return "groups or zero points are not alike in all experts"
    if first.group_size % RUN:
        return f"groups of {first.group_size} inputs, where a multiple of {RUN} can stay"
    if _group_size(shard, first) % RUN:
        ((start, stop),) = shard.spans
        return (
            f"this rank's inputs, {start} up to {stop}, do not begin and end at multiples of {RUN}: "
            "--enable-expert-parallel or another --tensor-parallel-size would keep them"
        )
    return None


def _form(shard: Shard, infos: Sequence[QuantisedInfo]) -> Form:
    stored = {info.dtype for info in infos}
    scale_dtype = getattr(torch, DTYPES[stored.pop()]) if len(stored) == 1 else torch.float32
    return Form(shard.shape, _group_size(shard, infos[0]), scale_dtype, _has_zeros(infos[0]))


def _group_size(shard: Shard, info: QuantisedInfo) -> int:
    """The largest that divides the checkpoint's groups and the shard's ends."""
    if shard.dim != len(shard.full_shape) - 1:
        return info.group_size
    return math.gcd(info.group_size, *(end for span in shard.spans for end in span))


def _has_zeros(info: QuantisedInfo) -> bool:
    return info.layout == AWQ or "weight_zero_point" in info.parts


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
