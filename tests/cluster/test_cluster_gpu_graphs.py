"""Decode steps replayed from CUDA graphs: the same tokens as without. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import FAMILIES, MIXTURES, write_checkpoint
from phalanx.worker.decode_graphs import DecodeGraphs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

NUM_TOKENS = 24
LATENT: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Heads as the real models have them."""

LIMITS = {"max_model_len": 128, "kv_cache_memory": 1 << 24, "max_num_seqs": 6, "max_num_batched_tokens": 64}


def traffic(*starts: int) -> list[Arrival]:
    """Prompts of several lengths that begin at these turns."""
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [
        Arrival(at=at, prompt=tuple((i * 31 + 7 * k) % 256 for k in range(3 + 5 * i)), sampling=sampling)
        for i, at in enumerate(starts)
    ]


def tokens(checkpoint: Path, arrivals: list[Arrival], **settings: Any) -> list[list[int]]:
    with Rig(checkpoint, device="cuda", **{**LIMITS, **settings}) as rig:
        return [outcome.tokens for outcome in rig.run(arrivals)]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each graph that a rank inside this process has replayed."""
    sizes: list[int] = []
    replay = DecodeGraphs.replay

    def counted(graphs: DecodeGraphs, *inputs: Any) -> Any:
        sizes.append(len(inputs[1]))
        return replay(graphs, *inputs)

    monkeypatch.setattr(DecodeGraphs, "replay", counted)
    return sizes


@pytest.mark.parametrize("num_streams", [1, 2, 4, 6])
def test_bfloat16_tokens_are_those_of_eager_steps(tmp_path: Path, replayed: list[int], num_streams: int) -> None:
    """Of as many rows as a graph has: padding could have libraries choose other kernels, and those round otherwise."""
    check_equal(write_checkpoint(tmp_path, "llama", initializer_range=0.3), replayed, num_streams)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_every_family(tmp_path: Path, replayed: list[int], family: str) -> None:
    check_equal(write_checkpoint(tmp_path, family, **(LATENT if "deepseek" in family else {})), replayed, 4)


def check_equal(checkpoint: Path, replayed: list[int], num_streams: int) -> None:
    arrivals, settings = traffic(*[0] * num_streams), {"dtype": "bfloat16", "max_num_batched_tokens": 256}
    eager = tokens(checkpoint, arrivals, cuda_graphs=False, **settings)
    assert not replayed
    assert tokens(checkpoint, arrivals, **settings) == eager
    assert replayed == [num_streams] * (NUM_TOKENS - 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_padded_steps(tmp_path: Path, replayed: list[int], family: str) -> None:
    checkpoint = write_checkpoint(tmp_path, family)
    arrivals, oracle = traffic(0, 0, 0, 9, 14), Oracle(checkpoint)
    for arrival, found in zip(arrivals, tokens(checkpoint, arrivals), strict=True):
        assert found == oracle.greedy(arrival.prompt, NUM_TOKENS, found)
    assert set(replayed) == {1, 2, 4, 6}


@pytest.mark.parametrize(
    ("num_gpus", "layout"),
    [
        (2, {"tensor_parallel_size": 2}),
        (2, {"tensor_parallel_size": 2, "ledger": True}),
        (2, {"pipeline_parallel_size": 2}),
        (2, {"data_parallel_size": 2, "enable_expert_parallel": True}),
        (2, {"data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "alltoall"}),
    ],
)
def test_layouts(tmp_path: Path, num_gpus: int, layout: dict[str, Any]) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    family = "mixtral" if "data_parallel_size" in layout else "llama"
    checkpoint = write_checkpoint(tmp_path, family, initializer_range=0.3, hidden_size=64, num_hidden_layers=4)
    arrivals = traffic(0, 0, 0, 0)
    graphs = tokens(checkpoint, arrivals, dtype="bfloat16", **layout)
    assert graphs == tokens(checkpoint, arrivals, dtype="bfloat16", cuda_graphs=False, **layout)
