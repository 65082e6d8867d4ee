"""The kernel for experts in 4 bits against torch's own operations.

Needs an NVIDIA GPU; or Triton, to be interpreted on a CPU: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import moe_four_bits as oracle
import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from phalanx.moe import four_bits_triton as kernel
from phalanx.moe.four_bits import FourBitWeight

IS_INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
if IS_INTERPRETED:  # Triton 3.6's interpreter multiplies the bits of bfloat16 as if they were integers
    del TOLERANCES[torch.bfloat16]
HALVES = [dtype for dtype in TOLERANCES if dtype != torch.float32]
TILES = (*kernel._TILES.values(), kernel._LARGE_TILE, kernel._FLOAT32_TILE)


def check(
    rows: Sequence[int],
    num_others: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    num_outputs: int = 72,
    num_inputs: int = 256,
    group_size: int = 128,
    has_zeros: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    tile: kernel._Tile | None = None,
) -> None:
    """So many rows for each expert, and behind them others' rows, which hold NaN: reading them would show."""
    generator = torch.Generator().manual_seed(sum(rows))
    weight = oracle.random_weight(
        len(rows),
        num_outputs,
        num_inputs,
        group_size=group_size,
        has_zeros=has_zeros,
        scale_dtype=scale_dtype,
        device=DEVICE,
    )
    x_PI = torch.randn(sum(rows) + num_others, num_inputs, generator=generator).to(DEVICE, dtype)
    x_PI[sum(rows) :] = torch.nan
    ends_L = torch.tensor(rows, device=DEVICE).cumsum(0).int()
    if tile is None:
        found_PO = kernel.grouped_linear(x_PI, weight, ends_L)
    else:
        found_PO = kernel._launch(x_PI, weight, ends_L, tile)
    assert found_PO.dtype == dtype
    assert found_PO.shape == (len(x_PI), num_outputs)
    if not sum(rows):
        return
    on_cpu = FourBitWeight(*(None if part is None else part.cpu() for part in weight))
    expected_PO = oracle.reference(x_PI.cpu(), on_cpu, ends_L.cpu())[: sum(rows)]
    torch.testing.assert_close(
        found_PO[: sum(rows)].cpu().float() / expected_PO.float().abs().max(),
        expected_PO.float() / expected_PO.float().abs().max(),
        atol=TOLERANCES[dtype],
        rtol=0,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(96, 32), (192, 64), (256, 128), (96, 96), (384, 192)])
def test_groups(num_inputs: int, group_size: int, has_zeros: bool, dtype: torch.dtype) -> None:
    """Also one of all inputs (a channel), and sizes that are no power of two."""
    check([3, 0, 5], num_inputs=num_inputs, group_size=group_size, has_zeros=has_zeros, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tile", TILES)
def test_tiles(tile: kernel._Tile, dtype: torch.dtype) -> None:
    """Rows and outputs that fill no tile, one exactly, and several."""
    check([1, tile.rows, 0, tile.rows + 1, 2 * tile.rows - 1], tile=tile, dtype=dtype, num_outputs=tile.outputs + 8)
    check([0, 0, 2], tile=tile, dtype=dtype, num_outputs=8)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("rows", "num_others"),
    [
        ([1], 0),
        ([40], 0),
        ([0, 0, 0], 0),
        ([0, 0, 0], 7),
        ([0, 70, 0, 0], 0),
        ([0, 0, 0, 70], 30),
        ([70, 0, 0, 0], 30),
        ([16, 16, 16], 16),
        ([15, 17, 1, 0, 33], 1),
    ],
)
def test_any_shares_of_the_rows(rows: list[int], num_others: int, dtype: torch.dtype) -> None:
    """No rows at all, all of them one expert's, others' rows behind the last."""
    check(rows, num_others, dtype=dtype)


@pytest.mark.parametrize("seed", range(4))
def test_random_shares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts = int(torch.randint(1, 40, (), generator=generator))
    rows = (torch.rand(num_experts, generator=generator) ** 8 * 100).int().tolist()
    check(rows, 5, dtype=HALVES[0], num_outputs=136)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_any_type(scale_dtype: torch.dtype) -> None:
    check([3, 4], scale_dtype=scale_dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_after_warming_up_nothing_is_compiled(dtype: torch.dtype) -> None:
    weight = oracle.random_weight(4, 64, 128, group_size=64, has_zeros=True, device=DEVICE)
    kernel.warm_up(weight, dtype)
    if IS_INTERPRETED:
        return
    (cache, *_) = kernel._grouped_linear.device_caches[torch.cuda.current_device()]
    before = len(cache)
    for num_rows in (1, 17, 4 * 24, 4 * 40, 4 * 100, 4 * 200):
        x_PI = torch.randn(num_rows, 128, device=DEVICE, dtype=dtype)
        kernel.grouped_linear(x_PI, weight, torch.tensor([1, 1, 1, num_rows], device=DEVICE).int())
    assert len(cache) == before


@pytest.mark.skipif(IS_INTERPRETED, reason="needs an NVIDIA GPU")
def test_nothing_waits_for_the_device() -> None:
    weight = oracle.random_weight(4, 64, 128, group_size=64, has_zeros=True, device=DEVICE)
    x_PI, ends_L = torch.randn(9, 128, device=DEVICE), torch.tensor([1, 1, 5, 8], device=DEVICE).int()
    kernel.grouped_linear(x_PI, weight, ends_L)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.grouped_linear(x_PI, weight, ends_L)
    finally:
        torch.cuda.set_sync_debug_mode("default")
