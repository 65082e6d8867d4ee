"""A reload on a GPU, with graphs of decode steps. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Oracle

from phalanx import LLM, SamplingParams
from phalanx.errors import NotNowError
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPT = [(7 * i) % 250 for i in range(40)]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def expected(checkpoint: Path) -> list[int]:
    return Oracle(checkpoint).greedy(tuple(PROMPT), NUM_TOKENS)


def made(llm: LLM) -> list[int]:
    return list(llm.generate([PROMPT], GREEDY)[0].token_ids)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpu_gets_other_weights(tmp_path: Path, family: str, cuda_graphs: bool) -> None:
    old, new = (write_checkpoint(tmp_path / str(seed), family, seed=seed) for seed in (0, 1))
    with LLM(
        str(old),
        device="cuda",
        dtype="float32",
        kv_cache_memory=1 << 24,
        max_model_len=128,
        cuda_graphs=cuda_graphs,
    ) as llm:
        assert made(llm) == expected(old)
        llm.reload(str(new))
        assert made(llm) == expected(new)
        with pytest.raises(NotNowError, match="of CPUs only"):
            llm.sleep()
