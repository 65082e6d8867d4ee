"""Real weights speak real text, on every layout of ranks: the sample model that `make serve` serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import Oracle
from rig import Arrival, Rig
from tokenizers import Tokenizer

from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.protocol.sampling import SamplingParams

SAMPLE = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SAMPLE.exists(), reason="the sample model is not here: make model"),
]

PROMPTS = ("The capital of France is", "Once upon a time, there was a", "Water boils at a temperature of")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return resolve(str(SAMPLE))


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Oracle:
    return Oracle(checkpoint.path)


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def rig(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Iterator[Rig]:
    tp_size, num_stages = request.param
    with Rig(
        checkpoint.path,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=num_stages,
        max_num_seqs=4,
        max_model_len=256,
    ) as rig:
        yield rig


def test_the_sample_says_what_transformers_makes_it_say(checkpoint: Checkpoint, oracle: Oracle, rig: Rig) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [tuple(tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    outcomes = rig.run([Arrival(i, prompt, sampling) for i, prompt in enumerate(prompts)])
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        expected = oracle.greedy(prompt, NUM_TOKENS, outcome.tokens)
        assert outcome.tokens[: len(expected)] == expected
    assert tokenizer.decode(outcomes[0].tokens).startswith(" Paris")
