"""Other weights in a model that runs, and its sleep: what is generated then is what transformers makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import Oracle

from phalanx import LLM, SamplingParams
from phalanx.errors import NotNowError
from phalanx.testing.checkpoints import write_checkpoint

PROMPT = [(7 * i) % 250 for i in range(40)]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


def expected(checkpoint: Path) -> list[int]:
    return Oracle(checkpoint).choices(tuple(PROMPT), [0] * NUM_TOKENS)


def made(llm: LLM) -> list[int]:
    return list(llm.generate([PROMPT], GREEDY)[0].token_ids)


@pytest.mark.parametrize("pack_weights", [True, False])
def test_one_rank_in_this_process(old: Path, new: Path, pack_weights: bool) -> None:
    with LLM(str(old), device="cpu", kv_cache_memory=1 << 22, pack_weights=pack_weights) as llm:
        assert made(llm) == expected(old)
        llm.reload(str(new))
        assert (made(llm), llm.weights_version) == (expected(new), 2)
        llm.sleep(1)
        with pytest.raises(NotNowError, match="asleep"):
            made(llm)
        llm.wake()
        assert (made(llm), llm.weights_version) == (expected(new), 2)
        llm.sleep(2)
        llm.wake(str(old))
        assert (made(llm), llm.weights_version) == (expected(old), 3)
