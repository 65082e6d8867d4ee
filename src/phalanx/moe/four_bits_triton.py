"""The grouped product of sorted rows with experts' matrices in 4 bits on NVIDIA GPUs: one Triton kernel.

A program takes some rows of one expert and some of its outputs, and goes through their inputs. It multiplies by number
minus 8, which is exact in every type, and what a tile of inputs adds up to in float32 is multiplied by the tile's
scale. Outputs are the rows of the matrix units' product: a Hopper GPU takes its left operand from registers, where the
bytes are unpacked, and its right one can be as narrow as a decoding step is. Zero points other than 8 would send the
unpacked operand through shared memory once more; so they are left out there, and make a product of their own at the
end: (8 - zero) * scale of each group with the sum of the row's inputs in that group.

Legend: as four_bits.py; M rows of a tile, N outputs of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.moe.four_bits import MIDDLE, RUN, FourBitWeight

MOST_INPUTS = 128
"""Of a tile, which are of one group."""

GROUPS = 16
"""Whose zero points are taken off at a time: the least that matrix units multiply."""


class _Tile(NamedTuple):
    rows: int
    outputs: int
    num_warps: int
    num_stages: int
    """Tiles of inputs on their way at a time."""


_TILES = {
    24: _Tile(rows=16, outputs=64, num_warps=4, num_stages=4),
    48: _Tile(rows=32, outputs=64, num_warps=4, num_stages=4),
    128: _Tile(rows=64, outputs=128, num_warps=4, num_stages=3),
}
"""By the rows that an expert has on average, at most. A few rows wait for memory: small tiles have more on its way."""

_LARGE_TILE = _Tile(rows=128, outputs=128, num_warps=8, num_stages=2)
"""For more rows: what is unpacked serves as many as shared memory has room for, on consumer GPUs too (99 KiB)."""

_FLOAT32_TILE = _Tile(rows=32, outputs=64, num_warps=4, num_stages=2)
"""Computed without matrix units."""


def grouped_linear(x_PI: Tensor, weight: FourBitWeight, ends_L: Tensor) -> Tensor:
    """See four_bits.py."""
    tile = _tile_for(len(x_PI) / len(weight.numbers_EOB), x_PI.dtype)
    return _launch(x_PI, weight, ends_L, tile)


def warm_up(weight: FourBitWeight, dtype: torch.dtype) -> None:
    """See four_bits.py."""
    num_experts, _, num_bytes = weight.numbers_EOB.shape
    no_ends_L = torch.zeros(num_experts, dtype=torch.int32, device=weight.numbers_EOB.device)
    x_1I = torch.zeros(1, 2 * num_bytes, dtype=dtype, device=weight.numbers_EOB.device)
    for tile in {_tile_for(num_rows, dtype) for num_rows in (*_TILES, max(_TILES) + 1)}:
        _launch(x_1I, weight, no_ends_L, tile)


def _tile_for(rows_per_expert: float, dtype: torch.dtype) -> _Tile:
    if dtype == torch.float32:
        return _FLOAT32_TILE
    return next((tile for most, tile in _TILES.items() if rows_per_expert <= most), _LARGE_TILE)


def _launch(x_PI: Tensor, weight: FourBitWeight, ends_L: Tensor, tile: _Tile) -> Tensor:
    num_rows, num_inputs = x_PI.shape
    num_experts, num_outputs, _ = weight.numbers_EOB.shape
    out_PO = torch.empty(num_rows, num_outputs, dtype=x_PI.dtype, device=x_PI.device)
    # The rows of expert e begin in block ends_L[e - 1] // rows + e: an upper bound that needs no look at the device.
    num_blocks = num_rows // tile.rows + num_experts
    group_size = weight.group_size
    x_PI = x_PI.contiguous()
    has_zeros = weight.zeros_EGO is not None
    total_PG = (
        x_PI.view(num_rows, num_inputs // group_size, group_size).sum(2, dtype=torch.float32) if has_zeros else None
    )
    is_float32 = x_PI.dtype == torch.float32
    _grouped_linear[(num_blocks * triton.cdiv(num_outputs, tile.outputs),)](
        out_PO,
        x_PI,
        total_PG,
        weight.numbers_EOB,
        weight.scales_EGO,
        weight.zeros_EGO,
        ends_L,
        EXPERTS=num_experts,
        OUTPUTS=num_outputs,
        INPUTS=num_inputs,
        HAS_ZEROS=has_zeros,
        MIDDLE=MIDDLE,
        GROUP=group_size,
        HALF_RUN=RUN // 2,
        TILE_E=triton.next_power_of_2(num_experts),
        TILE_M=tile.rows,
        TILE_N=tile.outputs,
        TILE_I=min(MOST_INPUTS, group_size & -group_size),  # a power of two that divides it
        TILE_G=GROUPS,
        PRECISION="ieee" if is_float32 else "tf32",
        ZERO_PRECISION="ieee" if is_float32 else "tf32x3",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_PO


@triton.jit
def _grouped_linear(
    out,
    x,
    totals,
    numbers,
    scales,
    zeros,
    ends,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    MIDDLE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_RUN: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_G: tl.constexpr,
    PRECISION: tl.constexpr,
    ZERO_PRECISION: tl.constexpr,
):
    num_tiles = tl.cdiv(OUTPUTS, TILE_N)
    block = tl.program_id(0) // num_tiles
    e = tl.arange(0, TILE_E)
    begin_E = tl.load(ends + e - 1, mask=(e > 0) & (e < EXPERTS), other=0) // TILE_M + e
    expert = tl.sum(((begin_E <= block) & (e < EXPERTS)).to(tl.int32), 0) - 1
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    first = start + (block - start // TILE_M - expert) * TILE_M
    if first >= end:
        return

    m = first + tl.arange(0, TILE_M)
    n = tl.program_id(0) % num_tiles * TILE_N + tl.arange(0, TILE_N)
    b = tl.arange(0, TILE_I // 2)
    is_row_m = m < end
    is_output_n = n < OUTPUTS
    expert_row = expert.to(tl.int64) * OUTPUTS
    numbers_NB = numbers + (expert_row + n)[:, None] * (INPUTS // 2) + b[None, :]
    low_b = b // HALF_RUN * (2 * HALF_RUN) + b % HALF_RUN
    x_BM = x + m.to(tl.int64)[None, :] * INPUTS + low_b[:, None]
    first_group = expert_row * (INPUTS // GROUP)

    sum_NM = tl.zeros([TILE_N, TILE_M], tl.float32)
    # What a tile is scaled by is loaded while the one before is multiplied.
    scale_N = tl.load(scales + first_group + n, mask=is_output_n, other=0.0)
    for i in range(0, INPUTS, TILE_I):
        next_group = first_group + (i + TILE_I) // GROUP * OUTPUTS
        is_next_n = is_output_n & (i + TILE_I < INPUTS)
        next_scale_N = tl.load(scales + next_group + n, mask=is_next_n, other=0.0)
        pair_NB = tl.load(numbers_NB + i // 2, mask=is_output_n[:, None], other=0)
        x_low_BM = tl.load(x_BM + i, mask=is_row_m[None, :], other=0.0)
        x_high_BM = tl.load(x_BM + i + HALF_RUN, mask=is_row_m[None, :], other=0.0)
        low_NB = ((pair_NB & 15).to(tl.int8) - MIDDLE).to(x_low_BM.dtype)
        high_NB = ((pair_NB >> 4).to(tl.int8) - MIDDLE).to(x_low_BM.dtype)
        product_NM = tl.dot(low_NB, x_low_BM, input_precision=PRECISION)
        product_NM = tl.dot(high_NB, x_high_BM, product_NM, input_precision=PRECISION)
        sum_NM += product_NM * scale_N.to(tl.float32)[:, None]
        scale_N = next_scale_N

    if HAS_ZEROS:
        for first_of_some in range(0, INPUTS // GROUP, TILE_G):
            g = first_of_some + tl.arange(0, TILE_G)
            is_group_g = g < INPUTS // GROUP
            places_NG = first_group + g[None, :] * OUTPUTS + n[:, None]
            is_place_NG = is_output_n[:, None] & is_group_g[None, :]
            zero_NG = tl.load(zeros + places_NG, mask=is_place_NG, other=0)
            scale_NG = tl.load(scales + places_NG, mask=is_place_NG, other=0.0)
            total_GM = tl.load(
                totals + m[None, :] * (INPUTS // GROUP) + g[:, None],
                mask=is_group_g[:, None] & is_row_m[None, :],
                other=0.0,
            )
            off_NG = (MIDDLE - zero_NG).to(tl.float32) * scale_NG.to(tl.float32)
            sum_NM = tl.dot(off_NG, total_GM, sum_NM, input_precision=ZERO_PRECISION)

    tl.store(
        out + m.to(tl.int64)[None, :] * OUTPUTS + n[:, None],
        sum_NM.to(out.dtype.element_ty),
        mask=is_row_m[None, :] & is_output_n[:, None],
    )
