"""Experts' matrices that stay in 4 bits, in the one layout in which a GPU multiplies by them.

Whatever the checkpoint's layout, 16 bytes in a row hold 32 consecutive inputs of an output: byte i has input i in its
low half and input i + 16 in its high half. So a kernel gets both operands of a product from memory in long pieces, and
no number has to move to another thread. A group of inputs has a scale, in the checkpoint's type, and a zero point for
each output: a number stands for (number - zero point) * scale.

Shape suffixes: E experts, O outputs, I inputs, B bytes of inputs (I / 2), G groups of inputs, P rows, L experts' ends.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

RUN = 32
"""Inputs in 16 bytes. Groups are a multiple of this."""

MIDDLE = 8
"""The zero point where there are none."""


class FourBitWeight(NamedTuple):
    """A matrix of each of some experts."""

    numbers_EOB: Tensor
    """uint8."""
    scales_EGO: Tensor
    zeros_EGO: Tensor | None = None
    """int8; None if all are `MIDDLE`."""

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return 2 * self.numbers_EOB.shape[2] // self.scales_EGO.shape[1]


def pack(number_OI: Tensor) -> Tensor:
    """Numbers from 0 to 15 (uint8) of one matrix as bytes [O, B]."""
    halves = number_OI.reshape(len(number_OI), -1, 2, RUN // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def can_multiply(device: torch.device) -> bool:
    """Whether there is a kernel: on a GPU whose torch brought Triton along."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def grouped_linear(x_PI: Tensor, weight: FourBitWeight, ends_L: Tensor) -> Tensor:
    """What each row's expert makes of it, [P, O], in the type of `x_PI`; summed up in float32.

    Rows are in the order of their experts; `ends_L` (int32) is where each expert's end. What comes after the last is
    undefined. Waits for nothing.
    """
    from phalanx.moe import four_bits_triton  # a CPU's torch has no Triton

    return four_bits_triton.grouped_linear(x_PI, weight, ends_L)


def warm_up(weight: FourBitWeight, dtype: torch.dtype) -> None:
    """Compile what products of rows of this type with such a weight need, so that no step has to. Takes seconds."""
    from phalanx.moe import four_bits_triton

    four_bits_triton.warm_up(weight, dtype)
