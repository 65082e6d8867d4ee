"""Reload, sleep and wake on GPUs, with graphs of decode steps. Skipped where there are none."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_memory_used import used_bytes
from oracle import Oracle

from phalanx import LLM, SamplingParams
from phalanx.errors import MaintenanceError
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PROMPT = [(7 * i) % 250 for i in range(40)]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
CACHE_BYTES = 1 << 30
LARGER = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 6,
    "head_dim": 64,
    "initializer_range": 0.05,
}
"""So that weights take more than whatever else comes and goes."""
NOISE_BYTES = 48 << 20

LAYOUTS: dict[str, dict[str, Any]] = {
    "in this process": {},
    "in a process": {"launcher": "local"},
    "tp2": {"tensor_parallel_size": 2},
    "dp2": {"data_parallel_size": 2, "enable_expert_parallel": True},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def write(family: str, seed: int) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(f"{family}{seed}"), family, seed=seed, **LARGER)

    return write


@cache
def expected(checkpoint: Path) -> list[int]:
    return Oracle(checkpoint).greedy(tuple(PROMPT), NUM_TOKENS)


def made(llm: LLM) -> list[int]:
    return list(llm.generate([PROMPT], GREEDY)[0].token_ids)


@pytest.mark.parametrize(
    ("family", "layout", "cuda_graphs"),
    [
        ("llama", "in this process", True),
        ("llama", "in a process", False),
        ("llama", "tp2", True),
        ("qwen3_moe", "tp2", True),
        ("qwen3_moe", "dp2", True),
    ],
)
def test_other_weights_and_memory_that_comes_and_goes(
    checkpoints: Any, family: str, layout: str, cuda_graphs: bool
) -> None:
    settings = LAYOUTS[layout]
    if torch.cuda.device_count() < 2 and layout in ("tp2", "dp2"):
        pytest.skip("needs two GPUs")
    old, new = checkpoints(family, 0), checkpoints(family, 1)
    settings = {"kv_cache_memory": CACHE_BYTES, "max_model_len": 128, "cuda_graphs": cuda_graphs, **settings}
    with LLM(str(old), device="cuda", dtype="float32", **settings) as llm:
        assert made(llm) == expected(old)
        llm.reload(str(new))
        assert made(llm) == expected(new)
        awake = used_bytes()

        llm.sleep(1)
        without_cache = used_bytes()
        assert awake - without_cache > CACHE_BYTES - NOISE_BYTES
        llm.wake()
        assert made(llm) == expected(new)
        assert abs(used_bytes() - awake) < NOISE_BYTES

        llm.sleep(1)
        llm.sleep(2)
        without_weights = used_bytes()
        share = 1 if family == "llama" and layout != "tp2" else 2
        weight_bytes = (old / "model.safetensors").stat().st_size // share
        assert without_cache - without_weights > 0.9 * weight_bytes - NOISE_BYTES
        llm.wake(str(old))
        assert made(llm) == expected(old)
        assert abs(used_bytes() - awake) < NOISE_BYTES
        print(f"MiB: awake {awake >> 20}, level 1 {without_cache >> 20}, level 2 {without_weights >> 20}")


def test_who_finds_no_memory_sleeps_on(checkpoints: Any) -> None:
    """Somebody else has taken it meanwhile."""
    old = checkpoints("llama", 0)
    settings = {"dtype": "float32", "kv_cache_memory": 16 << 30, "max_model_len": 128}
    with LLM(str(old), device="cuda", launcher="local", **settings) as llm:
        for level in (1, 2):
            llm.sleep(level)  # type: ignore[arg-type]
            free_bytes, _ = torch.cuda.mem_get_info(0)
            taken = torch.empty(free_bytes - (8 << 30), dtype=torch.uint8, device="cuda:0")
            with pytest.raises(MaintenanceError, match=r"CUDA_ERROR_OUT_OF_MEMORY.*: the engine is still asleep"):
                llm.wake()
            del taken
            torch.cuda.empty_cache()
            llm.wake()
            assert made(llm) == expected(old)
