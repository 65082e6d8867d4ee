"""Ranks as Ray actors with a GPU each, over NCCL: one node. Skipped where there are no two GPUs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle

from phalanx import LLM
from phalanx.errors import EngineDeadError, PeerDiedError
from phalanx.protocol.client import FormationStats
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

PROMPTS = [[(i * 31 + 7 * k) % 256 for k in range(5 + 9 * i)] for i in range(8)]
NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
NAMED_WITHIN_S = 5.0
READY_WITHIN_S = 60.0
KILLED_AFTER_S = 0.1
HEALED_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def running_ray() -> Iterator[None]:
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(checkpoint: Path, **settings: Any) -> LLM:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "kv_cache_memory": 1 << 22}
    return LLM(str(checkpoint), launcher="ray", device="cuda", engine_restarts=0, **sizes, **settings)


@pytest.mark.parametrize(("tp_size", "num_stages"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_greedy_tokens_equal_transformers(tmp_path: Path, running_ray: None, tp_size: int, num_stages: int) -> None:
    if torch.cuda.device_count() < tp_size * num_stages:
        pytest.skip(f"needs {tp_size * num_stages} GPUs")
    checkpoint = write_checkpoint(tmp_path, num_hidden_layers=3)
    oracle = Oracle(checkpoint)
    with on_ray(checkpoint, tensor_parallel_size=tp_size, pipeline_parallel_size=num_stages) as llm:
        places = llm.collective_rpc("whereabouts")
        assert len({place["pid"] for place in places}) == tp_size * num_stages
        for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
            assert list(completion.token_ids) == oracle.greedy(tuple(prompt), NUM_TOKENS, completion.token_ids)


def test_half_precision_follows_the_oracle_for_a_while(tmp_path: Path, running_ray: None) -> None:
    """Rounding may turn a near tie: every chosen token is nearly the likeliest."""
    checkpoint = write_checkpoint(tmp_path, initializer_range=0.3)
    oracle = Oracle(checkpoint)
    with on_ray(checkpoint, tensor_parallel_size=2, dtype="bfloat16") as llm:
        for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
            expected_TV = oracle.logprobs(tuple(prompt), list(completion.token_ids))
            for row_V, token in zip(expected_TV, completion.token_ids, strict=True):
                assert row_V.max() - row_V[token] < 0.5


@pytest.mark.parametrize(("standby", "rung"), [(0, "new line"), (1, "standby")])
def test_a_killed_rank_is_replaced_and_its_memory_is_taken_over(
    tmp_path: Path, running_ray: None, standby: int, rung: str
) -> None:
    with on_ray(write_checkpoint(tmp_path), tensor_parallel_size=2, standby=standby) as llm:
        expected = [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]
        await_standby(llm, standby)
        places = llm.collective_rpc("whereabouts")
        threading.Timer(KILLED_AFTER_S, os.kill, (places[1]["pid"], signal.SIGKILL)).start()
        ends_at = time.monotonic() + HEALED_WITHIN_S
        while not formation_stats(llm).healed:
            assert [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)] == expected
            assert time.monotonic() < ends_at, formation_stats(llm)
        stats = formation_stats(llm)
        assert stats.healed == {rung: 1} and not stats.failed, stats
        after = llm.collective_rpc("whereabouts")
        assert [place["device"] for place in after] == [place["device"] for place in places]
        assert not {place["pid"] for place in after} & {place["pid"] for place in places}
        print(f"{rung}: {stats.last_pause_s:.3f} s")


def formation_stats(llm: LLM) -> FormationStats:
    stats = llm._core.formation.stats()  # type: ignore[attr-defined]
    assert stats is not None
    return stats


def await_standby(llm: LLM, standby: int) -> None:
    expires_at = time.monotonic() + READY_WITHIN_S
    while standby and formation_stats(llm).standby != "ready":
        assert time.monotonic() < expires_at, formation_stats(llm)
        time.sleep(0.05)


def test_a_killed_rank_is_named(tmp_path: Path, running_ray: None) -> None:
    with on_ray(write_checkpoint(tmp_path), tensor_parallel_size=2, heal=False) as llm:
        llm.generate(PROMPTS, GREEDY)
        os.kill(llm.collective_rpc("whereabouts")[1]["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises((EngineDeadError, PeerDiedError), match="rank 1"):
            llm.generate(PROMPTS, GREEDY)
        assert time.monotonic() - killed_at < NAMED_WITHIN_S
