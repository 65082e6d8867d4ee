"""Experts in 4 bits on GPUs: greedy tokens equal those of the model that they stand for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.quantised import AWQ_CONFIG, as_awq, as_compressed, compressed_config, quantise_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

NUM_TOKENS = 24
TRAFFIC = [
    Arrival(
        at=at,
        prompt=tuple((i * 31 + 7 * k) % 256 for k in range(1 + 9 * (i % 4))),
        sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS - 5 * (i % 3)),
    )
    for i, at in enumerate([0, 0, 3, 5, 40, 42, 80])
]
GROUP = 32
SHAPE = {"hidden_size": 64, "moe_intermediate_size": 128, "num_experts": 6}
FORMS = {
    "awq": (partial(as_awq, group_size=GROUP), {**AWQ_CONFIG, "group_size": GROUP}),
    "compressed-tensors": (
        partial(as_compressed, group_size=GROUP, symmetric=True),
        compressed_config(weights={"group_size": GROUP}),
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "a part of each expert": {"tensor_parallel_size": 2},
    "whole experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "replicas": {"data_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": "alltoall"},
    "experts that move": {
        "data_parallel_size": 2,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "num_redundant_experts": 2,
        "eplb_interval_steps": 8,
    },
}


class Model(NamedTuple):
    checkpoint: Path
    oracle: Oracle


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("quantised"), "qwen3_moe", **SHAPE)
    quantise_checkpoint(checkpoint, checkpoint / "plain", *FORMS[request.param])
    return Model(checkpoint, Oracle(checkpoint / "plain"))


def start(checkpoint: Path, **settings: object) -> Rig:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 22, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    return Rig(checkpoint, device="cuda", **{**limits, **settings})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_equal_those_of_the_model_that_they_stand_for(model: Model, layout: str) -> None:
    settings = LAYOUTS[layout]
    if len(settings) and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    with start(model.checkpoint, **settings) as rig:
        for arrival, outcome in zip(TRAFFIC, rig.run(TRAFFIC), strict=True):
            num_tokens = arrival.sampling.max_tokens or 0
            assert outcome.tokens == model.oracle.greedy(arrival.prompt, num_tokens, outcome.tokens)
        weight_bytes = rig.capacity.weight_bytes
        if layout == "experts that move":
            balance = rig.brain.stats().balance
            assert balance is not None
    with start(model.checkpoint, **settings, dequantise_weights=True) as rig:
        assert sum(weight_bytes) < 0.7 * sum(rig.capacity.weight_bytes), "experts are most of the model"
        for arrival, outcome in zip(TRAFFIC, rig.run(TRAFFIC), strict=True):
            num_tokens = arrival.sampling.max_tokens or 0
            assert outcome.tokens == model.oracle.greedy(arrival.prompt, num_tokens, outcome.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_the_oracle(model: Model, dtype: str) -> None:
    """Rounding may turn a near tie: every chosen token is nearly the likeliest."""
    with start(model.checkpoint, dtype=dtype) as rig:
        for arrival, outcome in zip(TRAFFIC, rig.run(TRAFFIC), strict=True):
            expected_TV = model.oracle.logprobs(arrival.prompt, outcome.tokens)
            for row_V, token in zip(expected_TV, outcome.tokens, strict=True):
                assert row_V.max() - row_V[token] < 0.5
