"""Experts shared out over replicas and ranks: greedy tokens equal transformers', whoever has work."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracle import Oracle
from rig import Arrival, Rig
from safetensors.torch import load_file, save_file

from phalanx.errors import ConfigError
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

LONG_RUN = Path(__file__).parents[2] / "benchmarks" / "lockstep.py"
BACKENDS = ("allgather_reducescatter", "alltoall")
NUM_LAYERS = 2


class Layout(NamedTuple):
    dp_size: int
    tp_size: int
    num_stages: int = 1

    def __str__(self) -> str:
        return f"dp{self.dp_size}-tp{self.tp_size}-pp{self.num_stages}"


GATHER, EXCHANGE = BACKENDS
RIGS = (
    (Layout(1, 2), GATHER),
    (Layout(3, 1), GATHER),
    (Layout(2, 2), GATHER),
    (Layout(2, 1, 2), GATHER),
    (Layout(1, 2), EXCHANGE),
    (Layout(2, 2), EXCHANGE),
    (Layout(3, 1), EXCHANGE),
)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    folder = write_checkpoint(tmp_path_factory.mktemp("mixtral"), "mixtral", num_local_experts=7)
    return folder, Oracle(folder)


@pytest.fixture(scope="module", params=RIGS, ids=lambda rig: f"{rig[0]}-{rig[1]}")
def rig(request: pytest.FixtureRequest, mixtral: tuple[Path, Oracle]) -> Iterator[Rig]:
    with start(mixtral[0], *request.param) as rig:
        yield rig


def start(checkpoint: Path, layout: Layout, backend: str, **settings: object) -> Rig:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 19, "max_num_seqs": 6, "max_num_batched_tokens": 13}
    return Rig(
        checkpoint,
        tensor_parallel_size=layout.tp_size,
        pipeline_parallel_size=layout.num_stages,
        data_parallel_size=layout.dp_size,
        enable_expert_parallel=True,
        all2all_backend=backend,
        **{**limits, **settings},
    )


def traffic(seed: int, num_requests: int = 12) -> list[Arrival]:
    """Prompts in chunks beside decoding, pauses in which a replica or all have nothing, and some who leave."""
    dice = random.Random(seed)
    arrivals, at = [], 0
    for _ in range(num_requests):
        at += dice.choice([0, 0, 1, 5, 40])
        prompt = tuple(dice.randrange(256) for _ in range(dice.choice([1, 3, 12, 30])))
        sampling = SamplingParams(temperature=0, max_tokens=dice.randint(1, 24))
        cancelled_at = at + dice.randint(0, 12) if dice.random() < 0.15 else None
        arrivals.append(Arrival(at, prompt, sampling, cancelled_at))
    return arrivals


def check(rig: Rig, oracle: Oracle, arrivals: list[Arrival]) -> None:
    for arrival, outcome in zip(arrivals, rig.run(arrivals), strict=True):
        was_cancelled = outcome.finish is FinishReason.CANCELLED
        num_tokens = len(outcome.tokens) if was_cancelled else arrival.sampling.max_tokens or 0
        assert outcome.tokens == oracle.greedy(arrival.prompt, num_tokens, outcome.tokens)


@pytest.mark.parametrize("seed", range(2))
def test_greedy_tokens_equal_transformers(rig: Rig, mixtral: tuple[Path, Oracle], seed: int) -> None:
    check(rig, mixtral[1], traffic(seed))


def test_one_token_in_the_world(rig: Rig, mixtral: tuple[Path, Oracle]) -> None:
    check(rig, mixtral[1], [Arrival(0, (5,), SamplingParams(temperature=0, max_tokens=3))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_go_to_the_experts_of_one_rank(tmp_path: Path, backend: str) -> None:
    """A correction bias that no score can make up for: two experts get everything, the others nothing, ever."""
    checkpoint = write_checkpoint(tmp_path, "deepseek_v3", n_group=1, topk_group=1)
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("e_score_correction_bias"):
            weights[name] = torch.zeros_like(tensor).index_fill_(0, torch.tensor([6, 7]), 100.0)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with start(checkpoint, Layout(2, 2), backend) as rig:
        check(rig, Oracle(checkpoint), traffic(0))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "minimax_m2", "glm4_moe"])
def test_every_family(tmp_path: Path, family: str) -> None:
    checkpoint = write_checkpoint(tmp_path, family)
    with start(checkpoint, Layout(2, 2), BACKENDS[len(family) % 2]) as rig:
        check(rig, Oracle(checkpoint), traffic(1, num_requests=6))


def test_a_short_form_of_the_long_run() -> None:
    """Eight ranks, random arrivals, a replica without work now and then."""
    command = [sys.executable, str(LONG_RUN), "--steps", "200", "-tp", "4", "-dp", "2", "--streams", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = re.search(
        r"(\d+) steps .* over 8 ranks: (\d+) requests, all complete(?s:.*)without a token: (\d+)\n"
        r"steps in which a rank had no token for its experts of a layer: (\d+)\n.*by rank: \[(.*)\]\n"
        r"tokens of (\d+) requests equal",
        done.stdout,
    )
    assert said is not None, done.stdout
    layers_by_rank = list(map(int, said[5].split(",")))
    num_steps, *counts, num_equal = map(int, said.group(1, 2, 3, 4, 6))
    assert min(*counts, num_equal) > 0, done.stdout
    assert len(layers_by_rank) == 8
    assert max(layers_by_rank) / NUM_LAYERS <= counts[-1] <= min(num_steps, sum(layers_by_rank)), "steps, not layers"


def test_what_cannot_be(mixtral: tuple[Path, Oracle], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"enable_expert_parallel: .*at most 7 ranks"):
        start(mixtral[0], Layout(4, 2), BACKENDS[0])
    with pytest.raises(ConfigError, match=r"enable_expert_parallel: .*is no mixture of experts"):
        start(write_checkpoint(tmp_path), Layout(2, 1), BACKENDS[0])
