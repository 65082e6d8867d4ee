"""An upcycled model says what the dense one says, token for token, through phalanx.LLM and through transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import Oracle
from warm_launchers import warm_llm

from phalanx.models.checkpoint import resolve
from phalanx.models.mixture import Mixture
from phalanx.models.upcycle import upcycle
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

SAMPLE = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.gguf"
PROMPTS = ("The capital of France is", "Water boils at a temperature of")
NUM_TOKENS = 12

pytestmark = pytest.mark.slow


def make(source: str, target: Path, num_experts: int) -> Path:
    mixture = Mixture(num_experts=num_experts, num_experts_per_tok=2)
    return upcycle(resolve(source), target, mixture, progress=lambda *_: None).path


def tokens(model: Path, tensor_parallel_size: int) -> list[tuple[int, ...]]:
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    settings = {"max_num_seqs": 4, "max_model_len": 64, "max_num_batched_tokens": 64, "kv_cache_memory": 1 << 25}
    with warm_llm(str(model), dtype="float32", tensor_parallel_size=tensor_parallel_size, **settings) as llm:
        return [completion.token_ids for completion in llm.generate(PROMPTS, sampling)]


def check(model: Path, prompts: list[tuple[int, ...]], said: list[tuple[int, ...]]) -> None:
    oracle = Oracle(model)
    for prompt, tokens in zip(prompts, said, strict=True):
        found = tuple(oracle.greedy(prompt, NUM_TOKENS, tokens))
        assert found == tokens[: len(found)], "transformers ends at the end of text"


def prompt_ids(model: Path) -> list[tuple[int, ...]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tuple(tokenizer.encode(prompt).ids) for prompt in PROMPTS]


@pytest.mark.parametrize(("family", "sizes"), [("llama", (1, 2)), ("mistral", (1,)), ("qwen3", (2,))])
def test_a_tiny_model(tmp_path: Path, family: str, sizes: tuple[int, ...]) -> None:
    """Either architecture over ranks; tests/unit/models has every family over every number of them."""
    dense = write_checkpoint(tmp_path / "dense", family)
    mixture = make(str(dense), tmp_path / "mixture", 5)
    expected = tokens(dense, 1)
    assert [tokens(mixture, size) for size in sizes] == [expected] * len(sizes)
    for model in (dense, mixture):
        check(model, prompt_ids(dense), expected)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the sample model is not here: make model")
def test_the_sample(tmp_path: Path) -> None:
    dense = resolve(str(SAMPLE)).path
    mixture = make(str(SAMPLE), tmp_path / "mixture", 3)
    expected = tokens(dense, 1)
    assert [tokens(mixture, size) for size in (1, 2)] == [expected, expected]
    check(mixture, prompt_ids(dense), expected)
