"""Stages in processes of their own: they overlap, and when one is gone or stuck, it is named by its global rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.errors import DeadlineError, PeerDiedError, PhalanxError, WorkerError
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.stage_clock import EXTENSION, both

pytestmark = pytest.mark.slow

STAGE_S = 0.05
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def start(checkpoint: Path, **settings: object) -> Rig:
    limits = {"max_model_len": 128, "kv_cache_memory": 1 << 20, "max_num_seqs": 8, "pipeline_parallel_size": 2}
    return Rig(checkpoint, **{**limits, **settings})


def arrivals(num_tokens: int = NUM_TOKENS) -> list[Arrival]:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [Arrival(0, tuple(range(10 * i, 10 * i + 8)), sampling) for i in range(4)]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_stages_compute_micro_batches_of_different_requests_at_once(checkpoint: Path, async_scheduling: bool) -> None:
    oracle = Oracle(checkpoint)
    with start(checkpoint, worker_extension_cls=EXTENSION, async_scheduling=async_scheduling) as rig:
        rig.executor.collective_rpc("make_layers_take", [STAGE_S])
        for arrival, outcome in zip(arrivals(), rig.run(arrivals()), strict=True):
            expected = oracle.greedy(arrival.prompt, NUM_TOKENS, outcome.tokens)
            assert outcome.tokens[: len(expected)] == expected
        first, last = rig.executor.collective_rpc("take_spans")
    if async_scheduling:
        assert len(first) > 1.8 * NUM_TOKENS, "two micro-batches for each token"
        num_overlapping = sum(bool(both([span], last)) for span in first)
        assert num_overlapping > len(first) / 2, "on a machine that does nothing else it is nearly all of them"
    else:
        assert both(first, last) == []


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_killed_rank_is_named(checkpoint: Path, victim: int) -> None:
    with start(checkpoint, tensor_parallel_size=2) as rig:
        pids = [place["pid"] for place in rig.executor.collective_rpc("whereabouts")]
        rig.run(arrivals(num_tokens=2))
        os.kill(pids[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(PeerDiedError, match=f"rank {victim} .*killed by SIGKILL"):
            rig.run(arrivals())
        assert time.monotonic() - killed_at < 3.0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_stage_is_named(checkpoint: Path, victim: int) -> None:
    with start(checkpoint, step_timeout_s=4.0) as rig:
        pids = [place["pid"] for place in rig.executor.collective_rpc("whereabouts")]
        os.kill(pids[victim], signal.SIGSTOP)
        with pytest.raises(PhalanxError, match=f"rank {victim}\\b") as caught:
            rig.run(arrivals())
        assert isinstance(caught.value, (WorkerError, DeadlineError))
        if victim == 0:
            assert "group pp0-1@0" in str(caught.value), "the stage that waits says for whom"
