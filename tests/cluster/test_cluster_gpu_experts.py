"""Experts shared out over GPUs: greedy tokens equal transformers', over NCCL. Skipped where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Rig
from safetensors.torch import load_file, save_file

from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

BACKENDS = ("allgather_reducescatter", "alltoall")
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "minimax_m2", "glm4_moe", "gpt_oss")
NUM_TOKENS = 24
TRAFFIC = [
    Arrival(
        at=at,
        prompt=tuple((i * 31 + 7 * k) % 256 for k in range(1 + 9 * (i % 4))),
        sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS - 5 * (i % 3)),
    )
    for i, at in enumerate([0, 0, 3, 5, 40, 42, 80])  # together, apart, alone: replicas run empty
]


def start(checkpoint: Path, dp_size: int, tp_size: int, num_stages: int, backend: str, **settings: object) -> Rig:
    if torch.cuda.device_count() < dp_size * tp_size * num_stages:
        pytest.skip(f"needs {dp_size * tp_size * num_stages} GPUs")
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 22, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    return Rig(
        checkpoint,
        device="cuda",
        data_parallel_size=dp_size,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=num_stages,
        enable_expert_parallel=True,
        all2all_backend=backend,
        **{**limits, **settings},
    )


def check(rig: Rig, oracle: Oracle) -> None:
    for arrival, outcome in zip(TRAFFIC, rig.run(TRAFFIC), strict=True):
        num_tokens = arrival.sampling.max_tokens or 0
        assert outcome.tokens == oracle.greedy(arrival.prompt, num_tokens, outcome.tokens)


def num_counted(rig: Rig) -> int:
    """Tokens that all ranks say their experts have had."""
    loads = rig.executor.collective_rpc("expert_load")
    return sum(sum(layer["num_tokens"]) for rank in loads for layer in rank.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dp_size", "tp_size", "num_stages"), [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_every_layout(tmp_path: Path, dp_size: int, tp_size: int, num_stages: int, backend: str) -> None:
    checkpoint = write_checkpoint(tmp_path, "mixtral", num_local_experts=7, num_hidden_layers=3)
    with start(checkpoint, dp_size, tp_size, num_stages, backend) as rig:
        assert num_counted(rig) == 0, "sizing counts for nobody"
        check(rig, Oracle(checkpoint))
        assert num_counted(rig) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tmp_path, family)
    tp_size = 2 if torch.cuda.device_count() >= 4 else 1
    with start(checkpoint, 2, tp_size, 1, BACKENDS[len(family) % 2]) as rig:
        check(rig, Oracle(checkpoint))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_without_a_token_and_experts_that_move(tmp_path: Path, backend: str) -> None:
    """A correction bias that no score can make up for: two of eight experts, first on one rank, get everything."""
    checkpoint = write_checkpoint(tmp_path, "deepseek_v3", n_group=1, topk_group=1)
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.zeros_like(tensor).index_fill_(0, torch.tensor([6, 7]), 100.0)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    oracle = Oracle(checkpoint)
    with start(checkpoint, 2, 1, 1, backend) as rig:
        check(rig, oracle)
    balanced = {"enable_eplb": True, "num_redundant_experts": 2, "eplb_interval_steps": 8}
    with start(checkpoint, 2, 1, 1, backend, **balanced) as rig:
        check(rig, oracle)
        moved = rig.executor.collective_rpc("expert_load")
        assert all(len(set(layer["experts"]) & {6, 7}) for rank in moved for layer in rank.values()), moved
        check(rig, oracle)


def test_half_precision_in_grouped_products(tmp_path: Path) -> None:
    """Rounding may turn a near tie: every chosen token is nearly the likeliest."""
    checkpoint = write_checkpoint(
        tmp_path, "qwen3_moe", initializer_range=0.3, moe_intermediate_size=64, hidden_size=64
    )
    oracle = Oracle(checkpoint)
    with start(checkpoint, 2, 1, 1, BACKENDS[0], dtype="bfloat16") as rig:
        for arrival, outcome in zip(TRAFFIC, rig.run(TRAFFIC), strict=True):
            expected_TV = oracle.logprobs(arrival.prompt, outcome.tokens)
            for row_V, token in zip(expected_TV, outcome.tokens, strict=True):
                assert row_V.max() - row_V[token] < 0.5
