"""The same oracle on GPUs: one, and two or four over NCCL. Skipped where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import FAMILIES, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WORKLOAD = [
    Arrival(
        at=3 * i,
        prompt=tuple((i * 31 + 7 * k) % 256 for k in range(5 + 9 * i)),
        sampling=SamplingParams(temperature=0, max_tokens=40),
    )
    for i in range(8)
]


@pytest.mark.parametrize(("tp_size", "num_stages"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_on_gpus(tmp_path: Path, family: str, tp_size: int, num_stages: int) -> None:
    if torch.cuda.device_count() < tp_size * num_stages:
        pytest.skip(f"needs {tp_size * num_stages} GPUs")
    checkpoint = write_checkpoint(tmp_path, family, num_hidden_layers=3)
    oracle = Oracle(checkpoint)
    with Rig(
        checkpoint,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=num_stages,
        device="cuda",
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_model_len=256,
        kv_cache_memory=1 << 22,
    ) as rig:
        for arrival, outcome in zip(WORKLOAD, rig.run(WORKLOAD), strict=True):
            assert outcome.tokens == oracle.greedy(arrival.prompt, 40, outcome.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_the_oracle_for_a_while(tmp_path: Path, dtype: str) -> None:
    """Rounding may turn a near tie: most first tokens agree, and every chosen token is nearly the likeliest."""
    checkpoint = write_checkpoint(tmp_path, "llama", initializer_range=0.3)
    oracle = Oracle(checkpoint)
    with Rig(checkpoint, dtype=dtype, device="cuda", max_num_seqs=8, max_model_len=256, kv_cache_memory=1 << 22) as rig:
        for arrival, outcome in zip(WORKLOAD, rig.run(WORKLOAD), strict=True):
            expected_TV = oracle.logprobs(arrival.prompt, outcome.tokens)
            for row_V, token in zip(expected_TV, outcome.tokens, strict=True):
                assert row_V.max() - row_V[token] < 0.5
