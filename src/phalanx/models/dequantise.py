"""Reads a part of a matrix in 4 bits, dequantised or as its numbers, and no more of its file than that part needs.

Shape suffixes: O outputs, I inputs, G groups, W words of eight numbers, N bytes of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phalanx.models.quantisation import AWQ, MXFP4, PACK_QUANTIZED, PER_WORD, QuantisedInfo
from phalanx.topology.sharding import Span

Slices = Callable[[str], Any]
"""What safetensors gives of a tensor by its suffix: to be indexed, which reads that part."""

_BITS = 4
_MASK = (1 << _BITS) - 1

_MIDDLE = 1 << (_BITS - 1)
"""The number that stands for zero where there are no zero points."""


class Numbers(NamedTuple):
    """A part of a matrix as it is stored: numbers from 0 to 15, and what the groups that its inputs belong to have."""

    number_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    """None if all are 8."""


def read_quantised(info: QuantisedInfo, slices: Slices, rows: Span, columns: Span) -> Tensor:
    """Some rows and columns of the matrix, in float32: (number - zero point) * scale."""
    return _READERS[info.layout](info, slices, rows, columns)


def read_numbers(info: QuantisedInfo, slices: Slices, rows: Span, columns: Span) -> Numbers:
    """Some rows and columns of the matrix without dequantising them. Its groups are of consecutive inputs."""
    if info.layout == AWQ:
        number_IO, scale_GO, zero_GO = _awq_parts(info, slices, rows, columns)
        return Numbers(number_IO.T, scale_GO.T, zero_GO.T)
    assert info.layout == PACK_QUANTIZED
    return _pack_quantized_parts(info, slices, rows, columns, _cover(columns, info.group_size))


def _read_awq(info: QuantisedInfo, slices: Slices, outputs: Span, inputs: Span) -> Tensor:
    number_IO, scale_GO, zero_GO = _awq_parts(info, slices, outputs, inputs)
    group_I = torch.arange(*inputs) // info.group_size - inputs.start // info.group_size
    weight_IO = number_IO.float().sub_(zero_GO[group_I]).mul_(scale_GO.float()[group_I])
    return weight_IO.T


def _awq_parts(info: QuantisedInfo, slices: Slices, outputs: Span, inputs: Span) -> tuple[Tensor, Tensor, Tensor]:
    words, groups = _cover(outputs, PER_WORD), _cover(inputs, info.group_size)
    number_IO = _unpack(slices("qweight")[slice(*inputs), slice(*words)], by_halves=True)
    zero_GO = _unpack(slices("qzeros")[slice(*groups), slice(*words)], by_halves=True)
    number_IO, zero_GO = (_trim(part, outputs, PER_WORD) for part in (number_IO, zero_GO))
    return number_IO, slices("scales")[slice(*groups), slice(*outputs)], zero_GO


def _read_pack_quantized(info: QuantisedInfo, slices: Slices, outputs: Span, inputs: Span) -> Tensor:
    groups = _cover(inputs, info.group_size)
    group_I = torch.arange(*inputs) // info.group_size
    if "weight_g_idx" in info.parts and (given_I := slices("weight_g_idx")[slice(*inputs)].long()).min() >= 0:
        group_I = given_I  # -1 would say that groups are consecutive inputs after all
        groups = Span(int(group_I.min()), int(group_I.max()) + 1)
    group_I = group_I - groups.start
    found = _pack_quantized_parts(info, slices, outputs, inputs, groups)
    weight_OI = found.number_OI.float()
    weight_OI.sub_(_MIDDLE if found.zero_OG is None else found.zero_OG.index_select(1, group_I))
    return weight_OI.mul_(found.scale_OG.float().index_select(1, group_I))


def _pack_quantized_parts(info: QuantisedInfo, slices: Slices, outputs: Span, inputs: Span, groups: Span) -> Numbers:
    number_OI = _unpack(slices("weight_packed")[slice(*outputs), slice(*_cover(inputs, PER_WORD))])
    zero_OG = None
    if "weight_zero_point" in info.parts:
        zero_WG = slices("weight_zero_point")[slice(*_cover(outputs, PER_WORD)), slice(*groups)]
        zero_OG = _trim(_unpack(zero_WG.T), outputs, PER_WORD).T
    scale_OG = slices("weight_scale")[slice(*outputs), slice(*groups)]
    return Numbers(_trim(number_OI, inputs, PER_WORD), scale_OG, zero_OG)


def _read_mxfp4(info: QuantisedInfo, slices: Slices, inputs: Span, outputs: Span) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    assert info.expert is not None
    index = (slice(info.expert, info.expert + 1), slice(*outputs), slice(*_cover(inputs, info.group_size)))
    blocks_1OGN, scales_1OG = slices("blocks")[index], slices("scales")[index]
    expert_1IO: Tensor = convert_moe_packed_tensors(blocks_1OGN, scales_1OG, dtype=torch.float32)
    return expert_1IO[0].narrow(0, inputs.start % info.group_size, inputs.size)


def _cover(span: Span, unit: int) -> Span:
    """The units that the span has a part of."""
    return Span(span.start // unit, -(-span.stop // unit))


def _trim(unpacked: Tensor, span: Span, unit: int) -> Tensor:
    """The span's own, from what the units that cover it have in the last dimension."""
    return unpacked.narrow(-1, span.start % unit, span.size)


def _unpack(words: Tensor, *, by_halves: bool = False) -> Tensor:
    """[rows, W] of int32 to [rows, 8 * W] of uint8: each word's numbers, from its lowest bits on.

    With `by_halves`, a word's first half has the even ones of its eight numbers, the second half the odd ones.
    """
    pairs = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    numbers = torch.stack((pairs & _MASK, pairs >> _BITS), dim=-1)
    if by_halves:
        numbers = numbers.view(*words.shape, 2, PER_WORD // 2).mT
    return numbers.reshape(words.shape[0], -1)


_READERS: dict[str, Callable[[QuantisedInfo, Slices, Span, Span], Tensor]] = {
    AWQ: _read_awq,
    PACK_QUANTIZED: _read_pack_quantized,
    MXFP4: _read_mxfp4,
}
