"""Experts that move between ranks while requests run: greedy tokens equal transformers', and the load gets even."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Outcome, Rig
from safetensors.torch import load_file, save_file

from phalanx.errors import ConfigError
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

BACKENDS = ("allgather_reducescatter", "alltoall")


class Model(NamedTuple):
    checkpoint: Path
    oracle: Oracle


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A correction bias that no score can make up for: two of eight experts, first on one rank, get everything."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("skewed"), "deepseek_v3", n_group=1, topk_group=1)
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.zeros_like(tensor).index_fill_(0, torch.tensor([6, 7]), 100.0)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return Model(checkpoint, Oracle(checkpoint))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral", num_local_experts=6)
    return Model(checkpoint, Oracle(checkpoint))


def start(checkpoint: Path, backend: str, **settings: object) -> Rig:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 19, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    replicas = {"data_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
    return Rig(checkpoint, all2all_backend=backend, **{**limits, **replicas, **settings})


def traffic(seed: int, num_requests: int) -> list[Arrival]:
    dice = random.Random(seed)
    arrivals = []
    for i in range(num_requests):
        prompt = tuple(dice.randrange(256) for _ in range(dice.choice([1, 3, 12, 30])))
        arrivals.append(Arrival(2 * i, prompt, SamplingParams(temperature=0, max_tokens=dice.randint(8, 32))))
    return arrivals


def check(model: Model, arrivals: list[Arrival], outcomes: list[Outcome]) -> None:
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        num_tokens = arrival.sampling.max_tokens or 0
        assert outcome.tokens == model.oracle.greedy(arrival.prompt, num_tokens, outcome.tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skew_is_evened_out_under_running_requests(
    skewed: Model, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="phalanx.engine")
    arrivals = traffic(0, num_requests=10)
    eplb = {"num_redundant_experts": 4, "eplb_interval_steps": 8}
    with start(skewed.checkpoint, backend, tensor_parallel_size=2, **eplb) as rig:
        check(skewed, arrivals, rig.run(arrivals))
        balance = rig.brain.stats().balance
        loads = [next(iter(layers.values())) for layers in rig.executor.collective_rpc("expert_load")]
    assert "busiest rank over the mean: 4.00 before, 1.33 after those of 1 of 1 layers moved" in caplog.text
    assert balance is not None
    assert (balance.num_moves, round(balance.expected, 2)) == (1, 1.33)
    experts = [expert for load in loads for expert in load["experts"]]
    assert experts.count(6) == experts.count(7) == 3
    assert set(experts) == set(range(8))
    since_the_move = [sum(load["num_tokens"]) for load in loads]
    assert max(since_the_move) < 1.6 * sum(since_the_move) / 4


def test_experts_that_move_again_and_again(mixtral: Model) -> None:
    """In a pipeline, in which one stage may be a step ahead of the other, and without an expert to spare."""
    arrivals = traffic(1, num_requests=6)
    with start(mixtral.checkpoint, "alltoall", pipeline_parallel_size=2, eplb_interval_steps=1) as rig:
        check(mixtral, arrivals, rig.run(arrivals))
        balance = rig.brain.stats().balance
    assert balance is not None
    assert balance.num_moves >= 3


def test_what_cannot_be(mixtral: Model) -> None:
    with pytest.raises(ConfigError, match=r"num_redundant_experts: .*multiple of 2"):
        start(mixtral.checkpoint, BACKENDS[0], num_redundant_experts=1)
    with pytest.raises(ConfigError, match=r"num_redundant_experts: .*only with enable_eplb"):
        start(mixtral.checkpoint, BACKENDS[0], num_redundant_experts=2, enable_eplb=False)
    with pytest.raises(ConfigError, match=r"enable_eplb: .*only with enable_expert_parallel"):
        start(mixtral.checkpoint, BACKENDS[0], enable_expert_parallel=False)
