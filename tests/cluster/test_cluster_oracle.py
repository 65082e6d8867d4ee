"""Greedy tokens equal transformers' in float32, for every family and every layout of ranks.

Random mixes of arrivals, lengths, shared prefixes and cancellations run on caches so small that requests are preempted,
and with steps so small that prompts are computed in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.config import ParallelConfig
from phalanx.errors import ConfigError
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

NUM_LAYERS = 3


class Layout(NamedTuple):
    """Ranks, and limits that make their work awkward."""

    tp_size: int
    num_stages: int
    max_num_batched_tokens: int
    block_size: int

    def __str__(self) -> str:
        return f"tp{self.tp_size}-pp{self.num_stages}"


LAYOUTS = (
    Layout(1, 1, 24, 4),
    Layout(2, 1, 11, 8),
    Layout(4, 1, 40, 16),
    Layout(1, 2, 24, 8),
    Layout(1, 3, 11, 4),
    Layout(2, 2, 13, 4),
)
NUM_HEADS = {
    "llama": (9, 3),
    "qwen2": (8, 4),
    "qwen3": (8, 2),
    "mistral": (4, 4),
    "mixtral": (6, 3),
    "qwen3_moe": (8, 4),
}
"""Query and KV heads; several do not divide by the number of ranks."""
TIED = ("qwen2", "qwen3")
"""Their head is the embedding: with several stages the last one reads it too."""


@pytest.fixture(scope="module", params=NUM_HEADS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    heads, kv_heads = NUM_HEADS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(
        folder,
        request.param,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=NUM_LAYERS,
        tie_word_embeddings=request.param in TIED,
    )
    return folder, Oracle(folder)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def rig(request: pytest.FixtureRequest, family: tuple[Path, Oracle]) -> Iterator[Rig]:
    (checkpoint, _), layout = family, request.param
    with Rig(
        checkpoint,
        tensor_parallel_size=layout.tp_size,
        pipeline_parallel_size=layout.num_stages,
        max_num_seqs=6,
        max_num_batched_tokens=layout.max_num_batched_tokens,
        block_size=layout.block_size,
        max_model_len=128,
        kv_cache_memory=_cache_bytes(checkpoint, layout, num_tokens=208),
        threads_per_rank=1,  # these matrices are too small to share out
    ) as rig:
        yield rig


def _cache_bytes(checkpoint: Path, layout: Layout, num_tokens: int) -> int:
    """Room for so few tokens that some requests must be preempted, on the rank with the most KV heads and layers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    kv_heads = -(-config.num_key_value_heads // layout.tp_size)
    num_layers = -(-NUM_LAYERS // layout.num_stages)
    return 2 * 4 * kv_heads * config.head_dim * num_layers * num_tokens


PREFIXES = [tuple((7 * i + 13 * k) % 256 for i in range(48)) for k in range(3)]
"""Prompts share these, so that the prefix cache is hit."""

prompts = st.builds(
    lambda k, shared, own: PREFIXES[k][:shared] + tuple(own),
    st.integers(0, 2),
    st.integers(0, 48),
    st.lists(st.integers(0, 255), min_size=1, max_size=20),
)
arrivals = st.builds(
    lambda at, prompt, num_tokens, lifetime: Arrival(
        at,
        prompt,
        SamplingParams(temperature=0, max_tokens=num_tokens),
        None if lifetime is None else at + lifetime,
    ),
    st.integers(0, 25),
    prompts,
    st.integers(1, 40),
    st.one_of(st.none(), st.none(), st.integers(0, 20)),
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(workload=st.lists(arrivals, min_size=1, max_size=10))
def test_greedy_tokens_equal_transformers(family: tuple[Path, Oracle], rig: Rig, workload: list[Arrival]) -> None:
    _, oracle = family
    for arrival, outcome in zip(workload, rig.run(workload), strict=True):
        tokens, limit = outcome.tokens, arrival.sampling.max_tokens or 0
        assert tokens == oracle.choices(arrival.prompt, tokens)
        assert oracle.eos_token_id not in tokens[:-1]
        if outcome.finish is FinishReason.CANCELLED:
            assert len(tokens) <= limit
        elif tokens[-1] == oracle.eos_token_id:
            assert outcome.finish is FinishReason.STOP
        else:
            assert (outcome.finish, len(tokens)) == (FinishReason.LENGTH, limit)
    assert rig.brain.stats().replicas[0].num_blocks_used == 0


def test_the_small_cache_preempts_and_prefixes_hit(family: tuple[Path, Oracle], rig: Rig) -> None:
    _, oracle = family
    before = rig.brain.stats().replicas[0].num_preemptions
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    workload = [Arrival(0, (*PREFIXES[k % 3][:40], k), sampling) for k in range(8)]
    outcomes = rig.run(workload) + rig.run(workload[:1])
    for arrival, outcome in zip([*workload, workload[0]], outcomes, strict=True):
        assert outcome.tokens == oracle.choices(arrival.prompt, outcome.tokens)
        assert len(outcome.tokens) == 40
    assert rig.brain.stats().replicas[0].num_preemptions > before
    assert any(outcome.num_cached > 0 for outcome in outcomes)


def test_logprobs_equal_transformers(family: tuple[Path, Oracle], rig: Rig) -> None:
    _, oracle = family
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=5, ignore_eos=True)
    workload = [Arrival(i, PREFIXES[i][: 20 + i], sampling) for i in range(3)]
    for arrival, outcome in zip(workload, rig.run(workload), strict=True):
        expected_TV = oracle.logprobs(arrival.prompt, outcome.tokens)
        for row_V, token, chosen, top in zip(expected_TV, outcome.tokens, outcome.chosen, outcome.top, strict=True):
            assert chosen == pytest.approx(row_V[token].item(), abs=1e-4)
            for other, logprob in top.items():
                assert logprob == pytest.approx(row_V[other].item(), abs=1e-4)
            assert list(top.values()) == pytest.approx(row_V.topk(5).values.tolist(), abs=1e-4)


SEEDED: dict[Path, list[list[int]]] = {}


def test_seeded_sampling_is_the_same_in_every_mix_and_layout(family: tuple[Path, Oracle], rig: Rig) -> None:
    checkpoint, _ = family
    seeded = [
        Arrival(0, PREFIXES[k][:10], SamplingParams(temperature=0.8, top_p=0.95, top_k=40, seed=k, max_tokens=15))
        for k in range(3)
    ]
    alone = [rig.run([arrival])[0].tokens for arrival in seeded]
    crowd = [Arrival(k, PREFIXES[k % 3][: 5 + k], SamplingParams(max_tokens=20)) for k in range(4)]
    together = [outcome.tokens for outcome in rig.run([*crowd, *seeded])[len(crowd) :]]
    assert together == alone
    assert SEEDED.setdefault(checkpoint, alone) == alone, "another layout chose other tokens"


def test_penalties_and_limits_are_the_same_in_every_layout(family: tuple[Path, Oracle], rig: Rig) -> None:
    checkpoint, _ = family
    penalised = [
        Arrival(
            0,
            PREFIXES[k % 3][: 12 + k],
            SamplingParams(
                temperature=0.7, seed=k, max_tokens=20, min_tokens=6, repetition_penalty=1.3, presence_penalty=0.4
            ),
        )
        for k in range(4)
    ]
    tokens = [outcome.tokens for outcome in rig.run(penalised)]
    assert PENALISED.setdefault(checkpoint, tokens) == tokens, "another layout chose other tokens"


PENALISED: dict[Path, list[list[int]]] = {}


def test_each_rank_caches_the_layers_of_its_stage(family: tuple[Path, Oracle], rig: Rig) -> None:
    block_bytes, parallel = rig.capacity.block_bytes, rig.config.parallel
    per_stage = [sum(block_bytes[i : i + parallel.tensor_parallel_size]) for i in _first_ranks(parallel)]
    if parallel.tensor_parallel_size <= 2:  # more ranks than KV heads share them
        whole = 2 * 4 * NUM_LAYERS * rig.capacity.block_size
        assert sum(per_stage) % whole == 0
        shares = {1: [3], 2: [2, 1], 3: [1, 1, 1]}[parallel.pipeline_parallel_size]
        assert [stage * NUM_LAYERS // sum(per_stage) for stage in per_stage] == shares


def _first_ranks(parallel: ParallelConfig) -> range:
    return range(0, parallel.world_size, parallel.tensor_parallel_size)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_over_gloo_the_tokens_are_the_same(tmp_path: Path, num_stages: int) -> None:
    checkpoint = write_checkpoint(tmp_path)
    oracle = Oracle(checkpoint)
    workload = [Arrival(i, PREFIXES[i][: 10 + i], SamplingParams(temperature=0, max_tokens=10)) for i in range(3)]
    with Rig(
        checkpoint,
        tensor_parallel_size=2,
        pipeline_parallel_size=num_stages,
        collective_backend="gloo",
        max_model_len=64,
        kv_cache_memory=1 << 20,
    ) as rig:
        for arrival, outcome in zip(workload, rig.run(workload), strict=True):
            assert outcome.tokens == oracle.greedy(arrival.prompt, 10, outcome.tokens)


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="at most 2 for this model") as refusal:
        Rig(checkpoint, pipeline_parallel_size=3)
    assert (refusal.value.field, refusal.value.value) == ("pipeline_parallel_size", 3)
