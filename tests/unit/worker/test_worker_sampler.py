"""The sampler against a slow plain reference, exact distributions and the edges of float32."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import NO_TOKEN, NewRequest
from phalanx.worker.draw import FIRST_CANDIDATES, inverse_cdf
from phalanx.worker.randomness import uniform
from phalanx.worker.sampler import Sampled, Sampler
from phalanx.worker.slots import SlotTable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EOS = 1


class Batch:
    """Requests in slots 0, 1, ... of one sampler."""

    def __init__(self, vocab_size: int, max_model_len: int = 200) -> None:
        self.table = SlotTable(max_num_seqs=64, max_model_len=max_model_len, block_size=16, num_blocks=1)
        self.sampler = Sampler(self.table, vocab_size, DEVICE)
        self.slots: list[int] = []
        self.positions: list[int] = []

    def add(
        self,
        *,
        prompt: tuple[int, ...] = (0,),
        output: tuple[int, ...] = (),
        seed: int = 0,
        position: int | None = None,
        **sampling: Any,
    ) -> Batch:
        slot = len(self.slots)
        request = NewRequest(
            slot=slot,
            token_ids=ints((*prompt, *output)),
            num_prompt=len(prompt),
            num_computed=0,
            blocks=b"",
            sampling=SamplingParams(**sampling),
            seed=seed,
            eos_token_ids=(EOS,),
        )
        self.table._admit(request)
        self.sampler.admit(request)
        self.slots.append(slot)
        self.positions.append(len(prompt) + len(output) if position is None else position)
        return self

    def run(self, logits: Any) -> Sampled:
        logits_RV = torch.tensor(logits, dtype=torch.float32, device=DEVICE)
        if logits_RV.ndim == 1:
            logits_RV = logits_RV.expand(len(self.slots), -1).clone()
        sampled = self.sampler.sample(logits_RV, np.array(self.slots), np.array(self.positions))
        self.positions = [position + 1 for position in self.positions]
        return sampled

    def tokens(self, logits: Any) -> list[int]:
        return self.run(logits).tokens_R.tolist()


def draws(logits: list[float], num: int, **sampling: Any) -> Counter[int]:
    """Tokens of one seed at many positions."""
    batch = Batch(len(logits), max_model_len=num).add(seed=1234, **sampling)
    tokens = batch.sampler.sample(
        torch.tensor(logits, dtype=torch.float32, device=DEVICE).expand(num, -1).clone(),
        np.zeros(num, dtype=np.int64),
        np.arange(1, num + 1),
    ).tokens_R
    return Counter(tokens.tolist())


# ------------------------------------------------------------------------------ reference


def reference(logits: list[float], request: dict[str, Any], u: float) -> tuple[int, float]:
    """The token in plain float64 arithmetic, and how far the outcome is from tipping over."""
    scores = penalised(logits, request)
    if len(request["output"]) < request["min_tokens"]:
        for token_id in (*request["stop_token_ids"], *(() if request["ignore_eos"] else (EOS,))):
            if token_id < len(scores):
                scores[token_id] = -math.inf
    top = max(scores)
    if request["temperature"] == 0:
        return scores.index(top), math.inf
    probs = [math.exp((score - top) / request["temperature"]) for score in scores]
    margin = min((abs(p - request["min_p"]) / p for p in probs if p and p < 1), default=1.0)
    probs = [p if p >= request["min_p"] else 0.0 for p in probs]
    order = sorted(range(len(probs)), key=lambda i: (-scores[i], i))
    if request["top_k"] > 0:
        order = order[: request["top_k"]]
    total, mass, kept = sum(probs[i] for i in order), 0.0, set()
    for i in order:
        margin = min(margin, abs(mass / total - request["top_p"]) if request["top_p"] < 1 else 1.0)
        if mass < request["top_p"] * total:
            kept.add(i)
        mass += probs[i]
    return choose([p if i in kept else 0.0 for i, p in enumerate(probs)], u, margin)


def penalised(logits: list[float], request: dict[str, Any]) -> list[float]:
    counts = Counter(request["output"])
    scores = list(logits)
    for i in {*request["prompt"], *counts}:
        repetition = request["repetition_penalty"]
        scores[i] = scores[i] / repetition if scores[i] > 0 else scores[i] * repetition
    for i, count in counts.items():
        scores[i] -= request["frequency_penalty"] * count + request["presence_penalty"]
    return scores


def choose(probs: list[float], u: float, margin: float) -> tuple[int, float]:
    total, mass, token = sum(probs), 0.0, None
    for i, p in enumerate(probs):
        mass += p
        margin = min(margin, abs(mass / total - u))
        if token is None and mass > u * total:
            token = i
    assert token is not None
    return token, margin


VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
# Logits and penalties are sums of few powers of two: float32 and the reference's float64 then agree on what is a tie.
NUMBERS = st.integers(-256, 256).map(lambda i: i / 64)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": TOKENS.filter(len),
        "output": TOKENS,
        "seed": st.integers(0, 2**64 - 1),
        "temperature": st.sampled_from([0.0, 0.25, 1.0, 3.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, VOCAB, 100]),
        "top_p": st.sampled_from([1.0, 0.913, 0.517, 0.0131]),
        "min_p": st.sampled_from([0.0, 0.0913, 0.613, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.75, -1.25]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 1.125, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 2.0, 0.5]),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.sampled_from([(), (3, 7), (11, 99)]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)
ROWS = st.lists(st.tuples(st.lists(NUMBERS, min_size=VOCAB, max_size=VOCAB), REQUESTS), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(ROWS)
def test_every_row_equals_the_reference_and_the_row_alone(rows: list[tuple[list[float], dict[str, Any]]]) -> None:
    batch = Batch(VOCAB)
    for _, request in rows:
        batch.add(max_tokens=None, **request)
    tokens = batch.tokens([logits for logits, _ in rows])
    for (logits, request), token in zip(rows, tokens, strict=True):
        assert Batch(VOCAB).add(max_tokens=None, **request).tokens([logits]) == [token]
        position = len(request["prompt"]) + len(request["output"])
        u = float(uniform(np.array([request["seed"]], dtype=np.uint64), np.array([position]))[0])
        expected, margin = reference(logits, request, u)
        if margin > 1e-5:
            assert token == expected


# ------------------------------------------------------------------------------ distributions


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_draws_follow_the_exact_distribution(temperature: float) -> None:
    logits = [0.0, 1.0, -1.0, 2.0, 2.0, -3.0, 0.5, -0.5]
    num = 20_000
    found = draws(logits, num, temperature=temperature)
    weights = np.exp(np.array(logits) / temperature)
    expected = num * weights / weights.sum()
    chi_square = sum((found[i] - expected[i]) ** 2 / expected[i] for i in range(len(logits)))
    assert chi_square < 30  # 7 degrees of freedom: exceeded once in 10,000


def test_restrictions_renormalise() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    num = 20_000
    for sampling, kept in (
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.65}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.75}, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        ({"min_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 3, "top_p": 0.75}, {1: 4 / 7, 3: 3 / 7}),  # 0.4 + 0.3 is 0.78 of the three
        ({"min_p": 0.6, "top_p": 0.55}, {1: 1.0}),  # 0.4 is 0.57 of the two
        ({"min_p": 0.6, "top_p": 0.55, "top_k": 3}, {1: 1.0}),
    ):
        found = draws(logits, num, **sampling)
        assert set(found) == set(kept), sampling
        for token, share in kept.items():
            assert abs(found[token] / num - share) < 0.015, sampling


# ------------------------------------------------------------------------------ ties and edges


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_the_lowest_id_wins_a_tie(sampling: dict[str, Any]) -> None:
    assert set(draws([1.0, 5.0, 5.0, 5.0], 200, **sampling)) == {1}


def test_as_many_tied_tokens_are_kept_as_asked_for() -> None:
    logits = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert set(draws(logits, 500, top_k=3)) == {1, 3, 4}
    assert set(draws(logits, 500, top_k=5)) == {0, 1, 3, 4, 5}
    assert set(draws([7.0] * 8, 500, top_p=0.5)) == {0, 1, 2, 3}
    assert set(draws([7.0] * 8, 500, top_p=0.51)) == {0, 1, 2, 3, 4}
    assert set(draws([7.0] * 8, 500, min_p=1.0)) == set(range(8))


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert draws([0.0] * 4, 1000, top_k=5) == draws([0.0] * 4, 1000)
    assert draws([0.0] * 4, 1000, top_k=4) == draws([0.0] * 4, 1000)
    assert draws([0.0] * 4, 1000, top_k=2**64 - 1) == draws([0.0] * 4, 1000)


def test_impossible_tokens_never_come() -> None:
    logits = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    for sampling in ({}, {"top_k": 4}, {"top_p": 0.999999}, {"temperature": 100.0}, {"repetition_penalty": 2.0}):
        assert set(draws(logits, 500, **sampling)) == {1, 3}


def test_infinite_logits_share_the_probability() -> None:
    logits = [3.0, math.inf, 3e38, math.inf, -math.inf]
    assert set(draws(logits, 500)) == {1, 3}
    assert draws(logits, 5, temperature=0.0) == {1: 5}


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-4, 1.0, 100.0])
def test_very_large_logits_do_not_overflow(temperature: float) -> None:
    assert set(draws([-3.4e38, 3.3e38, 3.4e38, 0.0], 50, temperature=temperature)) == {2}


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.worker.sampler.uniform", lambda seeds, positions: np.full(len(seeds), u))
    logits = [-math.inf, *[0.1 * i for i in range(30)], -1000.0, -math.inf]
    (token,) = draws(logits, 10)
    assert token == (1 if u == 0.0 else 30)


def test_a_share_that_was_rounded_up_to_the_whole_gives_a_possible_token() -> None:
    weights = torch.zeros(1, 300, device=DEVICE)
    weights[0, [3, 140]] = 0.3
    assert inverse_cdf(weights, torch.ones(1, dtype=torch.float64, device=DEVICE)).tolist() == [140]


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 2}, {"logprobs": 2}])
@pytest.mark.parametrize(
    "bad", [[0.0, math.nan, 1.0, 2.0], [math.nan] * 4, [-math.inf] * 4, [math.inf, math.nan, 0.0, 0.0]]
)
def test_a_row_without_a_token_is_told_and_harms_no_other(sampling: dict[str, Any], bad: list[float]) -> None:
    good = [0.0, 1.0, 2.0, 9.0]
    batch = Batch(4).add(**sampling).add(**sampling).add(**sampling)
    expected = Batch(4).add(**sampling).add(**sampling).add(**sampling).tokens([good, good, good])
    assert batch.tokens([good, bad, good]) == [expected[0], NO_TOKEN, expected[2]]


def test_more_tokens_in_the_nucleus_than_are_first_looked_at() -> None:
    vocab_size = 20 * FIRST_CANDIDATES
    found = draws([0.0] * vocab_size, 500, top_p=0.5)
    assert max(found) < vocab_size // 2
    assert max(found) > vocab_size // 2 - 200
    assert set(draws([0.0] * vocab_size, 20, top_p=0.5 / vocab_size)) == {0}
    exactly = FIRST_CANDIDATES / vocab_size
    assert max(draws([0.0] * vocab_size, 500, top_p=exactly)) < FIRST_CANDIDATES


# ------------------------------------------------------------------------------ seeds


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    generator = np.random.default_rng(0)
    vocab_size = 3000
    logits = generator.normal(0, 3, (20, vocab_size)).astype(np.float32)
    asked: list[dict[str, Any]] = [
        {"temperature": [0.0, 0.7, 1.0][i % 3], "top_p": [1.0, 0.9][i % 2], "top_k": [0, 40, 5, 0][i % 4], "seed": i}
        for i in range(20)
    ]

    def tokens(rows: list[int]) -> list[int]:
        batch = Batch(vocab_size)
        for i in rows:
            batch.add(position=100 + i, **asked[i])
        return batch.tokens(logits[rows])

    together = tokens(list(range(20)))
    for i in range(20):
        assert tokens([i]) == [together[i]]
    shuffled = generator.permutation(20).tolist()
    assert tokens(shuffled) == [together[i] for i in shuffled]


def test_logits_may_be_a_slice() -> None:
    """As of a vocabulary that was padded."""
    padded = torch.randn(2, 1100, device=DEVICE)
    asked = [{"seed": 1}, {"seed": 2, "top_p": 0.7, "top_k": 30}]
    expected = [
        Batch(1000).add(**one).run(padded[i : i + 1, :1000].tolist()).tokens_R.item() for i, one in enumerate(asked)
    ]
    batch = Batch(1000).add(**asked[0]).add(**asked[1])
    sampled = batch.sampler.sample(padded[:, :1000], np.array(batch.slots), np.array(batch.positions))
    assert sampled.tokens_R.tolist() == expected


def test_noise_in_the_logits_hardly_ever_changes_a_token() -> None:
    """Another tensor-parallel size adds up in another order."""
    generator = np.random.default_rng(1)
    vocab_size, num = 2000, 300
    logits = generator.normal(0, 3, (1, vocab_size)).astype(np.float32).repeat(num, axis=0)
    noisy = logits + generator.normal(0, 1e-6, (num, vocab_size)).astype(np.float32)
    batch = Batch(vocab_size).add(top_p=0.95, top_k=500)
    slots, positions = np.zeros(num, dtype=np.int64), np.arange(1, num + 1)
    first, second = (
        batch.sampler.sample(torch.tensor(values, device=DEVICE), slots, positions).tokens_R
        for values in (logits, noisy)
    )
    assert (first != second).sum() == 0
    assert len(set(first.tolist())) > 50


# ------------------------------------------------------------------------------ penalties, min_tokens, logprobs


def test_sampled_tokens_are_penalised_from_the_next_step_on() -> None:
    batch = Batch(4).add(temperature=0.0, frequency_penalty=1.0, prompt=(3,))
    assert [batch.tokens([0.0, 0.0, 0.5, 2.2])[0] for _ in range(8)] == [3, 3, 2, 3, 0, 1, 2, 3]


def test_repetition_counts_the_prompt_and_presence_does_not() -> None:
    batch = Batch(3).add(temperature=0.0, repetition_penalty=2.0, prompt=(2,))
    batch.add(temperature=0.0, presence_penalty=2.0, prompt=(2,))
    assert batch.tokens([0.0, 1.5, 2.0]) == [1, 2]
    assert batch.tokens([0.0, 1.5, 2.0]) == [2, 1]  # 1 and 2 are both halved; 2 is out by presence


def test_a_preempted_request_is_penalised_as_before() -> None:
    logits = [0.0, 1.0, 0.9, 0.8]
    batch = Batch(4).add(temperature=0.0, frequency_penalty=0.3, prompt=(3, 3))
    tokens = [batch.tokens(logits)[0] for _ in range(6)]
    for i in range(6):
        back = Batch(4).add(temperature=0.0, frequency_penalty=0.3, prompt=(3, 3), output=tuple(tokens[:i]))
        assert back.tokens(logits) == [tokens[i]]


def test_a_reused_slot_starts_without_counts() -> None:
    asked = {"temperature": 0.0, "frequency_penalty": 0.3, "presence_penalty": 0.1}
    batch = Batch(3).add(**asked)
    tokens = [batch.tokens([0.0, 1.0, 0.5])[0] for _ in range(5)]
    batch.sampler.drop(0)
    batch.table.given[0] = None
    batch.slots.clear()
    batch.positions.clear()
    batch.add(**asked)
    assert [batch.tokens([0.0, 1.0, 0.5])[0] for _ in range(5)] == tokens
    assert len(set(tokens)) > 1


def test_counts_grow_with_the_number_of_penalised_requests() -> None:
    batch = Batch(3)
    for i in range(9):
        batch.add(temperature=0.0, presence_penalty=2.0, output=(i % 3,))
    assert batch.tokens([0.9, 1.0, 0.8]) == [1, 0, 1] * 3


def test_no_end_before_min_tokens() -> None:
    logits = [0.0, 9.0, 8.0, 7.0]  # 1 ends the sequence
    asked = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2, 4, -5, 10**6)}
    batch = Batch(4)
    for output in ((), (0,), (0, 0)):
        batch.add(output=output, **asked)
    batch.add(ignore_eos=True, **asked)
    batch.add(temperature=0.0, min_tokens=2**64 - 1, max_tokens=None, output=(0, 0, 0))
    assert batch.tokens(logits) == [3, 3, 1, 1, 2]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = [0.0, 3.0, 1.0, 2.0]
    batch = Batch(4).add(temperature=0.0).add(temperature=0.0, logprobs=0, presence_penalty=2.0, output=(1,))
    batch.add(temperature=0.5, top_k=1, logprobs=2)
    sampled = batch.run(logits)
    assert sampled.tokens_R.tolist() == [1, 3, 1]
    assert sampled.logprobs is not None
    assert sampled.logprobs.entries_E.tolist() == [1, 2]
    expected = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(sampled.logprobs.chosen_E.cpu().double(), expected[[3, 1]])
    assert sampled.logprobs.top_ids_EK.tolist() == [[1, 3], [1, 3]]
    torch.testing.assert_close(sampled.logprobs.top_EK.cpu().double(), expected[[1, 3]].expand(2, -1))


def test_tied_logprobs_come_by_id_whatever_the_width() -> None:
    logits = [0.0] * 50 + [1.0] * 50
    for asked in (1, 5, 20):
        logprobs = Batch(100).add(logprobs=asked).run(logits).logprobs
        assert logprobs is not None
        ids = logprobs.top_ids_EK[0].tolist()
        assert ids == sorted(ids)
        assert len(ids) == asked
        widest = Batch(100).add(logprobs=20).run(logits).logprobs
        assert widest is not None
        assert widest.top_ids_EK[0, :asked].tolist() == ids


def test_logprobs_wider_than_the_vocabulary() -> None:
    logprobs = Batch(3).add(logprobs=20).run([1.0, 3.0, 2.0]).logprobs
    assert logprobs is not None
    assert logprobs.top_ids_EK.tolist() == [[1, 2, 0]]
