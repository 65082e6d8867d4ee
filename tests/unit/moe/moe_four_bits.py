"""Experts in 4 bits, and the same with torch's own operations: unpacked here, multiplied by transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from phalanx.moe.four_bits import FourBitWeight, pack


def random_weight(
    num_experts: int,
    num_outputs: int,
    num_inputs: int,
    *,
    group_size: int,
    has_zeros: bool,
    scale_dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> FourBitWeight:
    num_groups = num_inputs // group_size
    numbers = torch.randint(0, 16, (num_experts, num_outputs, num_inputs), dtype=torch.uint8)
    scales_EGO = (torch.rand(num_experts, num_groups, num_outputs) * 0.05 + 0.02).to(scale_dtype)
    zeros_EGO = torch.randint(0, 16, scales_EGO.shape, dtype=torch.int8) if has_zeros else None
    return FourBitWeight(
        torch.stack([pack(number_OI) for number_OI in numbers]).to(device),
        scales_EGO.to(device),
        None if zeros_EGO is None else zeros_EGO.to(device),
    )


def unpacked(weight: FourBitWeight) -> Tensor:
    """[E, O, I] in float32, a byte at a time."""
    num_experts, num_outputs, num_bytes = weight.numbers_EOB.shape
    number_EOI = torch.empty(num_experts, num_outputs, 2 * num_bytes, device=weight.numbers_EOB.device)
    for byte in range(num_bytes):
        low = byte // 16 * 32 + byte % 16
        number_EOI[:, :, low] = (weight.numbers_EOB[:, :, byte] % 16).float()
        number_EOI[:, :, low + 16] = (weight.numbers_EOB[:, :, byte] // 16).float()
    zeros_EGO = torch.full_like(weight.scales_EGO, 8) if weight.zeros_EGO is None else weight.zeros_EGO
    scale_EOI, zero_EOI = (
        part.float().transpose(1, 2).repeat_interleave(weight.group_size, dim=2)
        for part in (weight.scales_EGO, zeros_EGO)
    )
    return (number_EOI - zero_EOI) * scale_EOI


def reference(x_PI: Tensor, weight: FourBitWeight, ends_L: Tensor) -> Tensor:
    """In float32, and then in the type of `x_PI`. Rows behind the last expert's are undefined, and here NaN."""
    out_PO: Tensor = _grouped_linear(x_PI.float(), unpacked(weight), ends_L)
    out_PO = out_PO.to(x_PI.dtype)
    out_PO[int(ends_L[-1]) :] = torch.nan
    return out_PO
