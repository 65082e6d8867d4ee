"""The Triton kernel against attention with torch's own operations. Needs an NVIDIA GPU."""

from __future__ import annotations

import random

import pytest
import torch

from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.attention_torch import paged_attention as reference

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from phalanx.models.attention_triton import paged_attention

DEVICE = torch.device("cuda")
HEAD_DIMS = (16, 48, 64, 128)
LATENT_DIMS = (192, 128)
"""Keys and values of DeepSeek's latent attention, expanded."""


def random_rows(rng: random.Random) -> list[tuple[int, int]]:
    """New tokens and context of each row, decoding rows first."""
    decodes = [(1, rng.randint(1, 600)) for _ in range(rng.randint(0, 6))]
    prefills = [(n, n + rng.randint(0, 200)) for n in (rng.randint(2, 150) for _ in range(rng.randint(0, 4)))]
    return decodes + prefills or [(1, 1)]


def random_case(
    rng: random.Random, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch]:
    rows, block_size = random_rows(rng), rng.choice([4, 16, 32])
    kv_heads, group, head_dim = rng.randint(1, 4), rng.randint(1, 6), rng.choice(HEAD_DIMS)
    num_blocks = sum(-(-context // block_size) for _, context in rows) + 5
    # What no row owns is NaN: reading it would show.
    caches = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    free = rng.sample(range(num_blocks), num_blocks)
    tables = torch.zeros(len(rows), -(-max(context for _, context in rows) // block_size), dtype=torch.int32)
    for row, (_, context) in enumerate(rows):
        blocks = [free.pop() for _ in range(-(-context // block_size))]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(context):
            caches[:, blocks[position // block_size], position % block_size].normal_()
    starts = torch.tensor([0, *(n for n, _ in rows)]).cumsum(0).int()
    query_HTD = torch.randn(kv_heads * group, int(starts[-1]), head_dim, dtype=dtype, device=DEVICE)
    batch = AttentionBatch(
        query_starts_R1=starts.to(DEVICE),
        context_lens_R=torch.tensor([context for _, context in rows], dtype=torch.int32, device=DEVICE),
        block_tables_RB=tables.to(DEVICE),
        slots_T=torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
        max_query_len=max(n for n, _ in rows),
        max_context_len=max(context for _, context in rows),
        num_decodes=sum(n == 1 for n, _ in rows),
        block_size=block_size,
    )
    return query_HTD.transpose(0, 1), caches[0], caches[1], batch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sliding_window", [None, 1, 37])
@pytest.mark.parametrize("seed", range(4))
def test_sinks(seed: int, sliding_window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    query_THD, key_cache, value_cache, batch = random_case(random.Random(seed), dtype)
    sinks_H = torch.randn(query_THD.shape[1], dtype=dtype, device=DEVICE) * 2
    case = (query_THD, key_cache, value_cache, batch, query_THD.shape[-1] ** -0.5, sliding_window)
    torch.testing.assert_close(
        paged_attention(*case, sinks_H), reference(*case, sinks_H), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_new", [1, 70])
def test_keys_that_are_wider_than_values(num_new: int, dtype: torch.dtype, tolerance: float) -> None:
    (key_dim, value_dim), num_heads = LATENT_DIMS, 4
    query_THD = torch.randn(num_new, num_heads, key_dim, dtype=dtype, device=DEVICE)
    key_cache = torch.randn(16, 16, num_heads, key_dim, dtype=dtype, device=DEVICE)
    value_cache = torch.randn(16, 16, num_heads, value_dim, dtype=dtype, device=DEVICE)
    batch = AttentionBatch.of_one_row(num_new, 16, DEVICE)
    case = (query_THD, key_cache, value_cache, batch, key_dim**-0.5, None)
    torch.testing.assert_close(paged_attention(*case), reference(*case), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("sliding_window", [None, 1, 37])
@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_agrees_with_torch(
    seed: int, sliding_window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    query_THD, key_cache, value_cache, batch = random_case(random.Random(seed), dtype)
    scale = query_THD.shape[-1] ** -0.5
    found = paged_attention(query_THD, key_cache, value_cache, batch, scale, sliding_window)
    expected = reference(query_THD, key_cache, value_cache, batch, scale, sliding_window)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
