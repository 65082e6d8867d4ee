"""Greedy tokens equal transformers' in float32, for every family and every layout of ranks.

Random mixes of arrivals, lengths, shared prefixes and cancellations run on caches so small that requests are preempted,
and with steps so small that prompts are computed in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from rig import Arrival, Rig

from phalanx.protocol import FinishReason, SamplingParams
from phalanx.testing.checkpoints import FAMILIES, write_checkpoint

pytestmark = pytest.mark.slow

TP_SIZES = (1, 2, 4)
NUM_HEADS = {
    "llama": (9, 3),
    "qwen2": (8, 4),
    "qwen3": (8, 2),
    "mistral": (4, 4),
    "mixtral": (6, 3),
    "qwen3_moe": (8, 4),
}
"""Query and KV heads; several do not divide by the number of ranks."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    heads, kv_heads = NUM_HEADS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, request.param, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return folder, Oracle(folder)


@pytest.fixture(scope="module", params=TP_SIZES)
def rig(request: pytest.FixtureRequest, family: tuple[Path, Oracle]) -> Iterator[Rig]:
    checkpoint, _ = family
    with Rig(
        checkpoint,
        tensor_parallel_size=request.param,
        max_num_seqs=6,
        max_num_batched_tokens=(24, 11, 40)[TP_SIZES.index(request.param)],
        block_size=(4, 8, 16)[TP_SIZES.index(request.param)],
        max_model_len=128,
        kv_cache_memory=_cache_bytes(checkpoint, request.param, num_tokens=208),
    ) as rig:
        yield rig


def _cache_bytes(checkpoint: Path, tp_size: int, num_tokens: int) -> int:
    """Room for so few tokens that some requests must be preempted, on the rank with the most KV heads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    kv_heads = -(-config.num_key_value_heads // tp_size)
    return 2 * 4 * kv_heads * config.head_dim * config.num_hidden_layers * num_tokens


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
        expected = oracle.greedy(arrival.prompt, arrival.sampling.max_tokens or 0)
        if outcome.finish is FinishReason.CANCELLED:
            assert outcome.tokens == expected[: len(outcome.tokens)]
        else:
            assert outcome.tokens == expected
            ended_early = expected[-1] == oracle.eos_token_id
            assert outcome.finish is (FinishReason.STOP if ended_early else FinishReason.LENGTH)
    assert rig.brain.stats().num_blocks_used == 0


def test_the_small_cache_preempts_and_prefixes_hit(family: tuple[Path, Oracle], rig: Rig) -> None:
    _, oracle = family
    before = rig.brain.stats().num_preemptions
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    workload = [Arrival(0, (*PREFIXES[k % 3][:40], k), sampling) for k in range(8)]
    outcomes = rig.run(workload) + rig.run(workload[:1])
    for arrival, outcome in zip([*workload, workload[0]], outcomes, strict=True):
        expected = oracle.greedy(arrival.prompt, 40)
        assert outcome.tokens[: len(expected)] == expected
    assert rig.brain.stats().num_preemptions > before
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
    assert SEEDED.setdefault(checkpoint, alone) == alone, "another tensor-parallel size chose other tokens"


def test_over_gloo_the_tokens_are_the_same(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    oracle = Oracle(checkpoint)
    workload = [Arrival(i, PREFIXES[i][: 10 + i], SamplingParams(temperature=0, max_tokens=10)) for i in range(3)]
    with Rig(
        checkpoint, tensor_parallel_size=2, collective_backend="gloo", max_model_len=64, kv_cache_memory=1 << 20
    ) as rig:
        for arrival, outcome in zip(workload, rig.run(workload), strict=True):
            assert outcome.tokens == oracle.greedy(arrival.prompt, 10)
