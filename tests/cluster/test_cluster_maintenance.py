"""Other weights in a model that runs, and its sleep: what is generated then is what transformers makes."""

from __future__ import annotations

import os
import shutil
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from warm_launchers import warm_llm

from phalanx import LLM, SamplingParams
from phalanx.errors import CheckpointError, NotNowError
from phalanx.memory.host import bytes_of_family
from phalanx.protocol.client import Reload, Wake
from phalanx.testing.checkpoints import write_checkpoint

PROMPT = [(7 * i) % 250 for i in range(40)]
NUM_TOKENS = 12
MOVING = {"enable_eplb": True, "eplb_interval_steps": 2, "num_redundant_experts": 2}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("new"), seed=1)


@cache
def expected(checkpoint: Path) -> list[int]:
    return Oracle(checkpoint).greedy(tuple(PROMPT), NUM_TOKENS)


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


def test_memory_of_this_process_is_given_back(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    weight_bytes = (checkpoint / "model.safetensors").stat().st_size
    with LLM(str(checkpoint), device="cpu", kv_cache_memory=1 << 22) as llm:
        llm.reload()
        made(llm)
        awake = bytes_of_family(os.getpid())
        llm.sleep(2)
        assert bytes_of_family(os.getpid()) < awake - 0.6 * weight_bytes
        llm.wake()
        assert made(llm) == expected(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", {"pipeline_parallel_size": 2}),
        ("qwen3_moe", {"data_parallel_size": 2, "enable_expert_parallel": True}),
        ("qwen3_moe", {"data_parallel_size": 2, "enable_expert_parallel": True, **MOVING}),
    ],
)
def test_layouts(tmp_path: Path, family: str, layout: dict[str, Any]) -> None:
    first, second = (write_checkpoint(tmp_path / str(seed), family, seed=seed) for seed in (0, 1))
    with warm_llm(str(first), device="cpu", kv_cache_memory=1 << 22, **layout) as llm:
        assert made(llm) == expected(first)
        assert ("enable_eplb" in layout) == bool(num_moves(llm))
        llm.reload(str(second))
        assert made(llm) == expected(second)
        llm.sleep(2)
        llm.wake()
        assert made(llm) == expected(second)


def num_moves(llm: LLM) -> int:
    """Of layers whose experts have changed their places."""
    balance = llm._core.brain.stats().balance
    return 0 if balance is None else balance.num_moves


@pytest.mark.slow
def test_a_model_that_is_loaded_again_after_a_reload_has_the_tokenizer_of_the_start(
    old: Path, new: Path, tmp_path: Path
) -> None:
    """Weights alone, as a trainer writes them."""
    trained = Path(shutil.copytree(new, tmp_path / "trained"))
    for file in trained.glob("*token*"):
        file.unlink()
    layout: dict[str, Any] = {"device": "cpu", "tensor_parallel_size": 2, "kv_cache_memory": 1 << 22}
    with warm_llm(str(old), heal=False, **layout) as llm:
        llm.reload(str(trained))
        assert made(llm) == expected(new)
        os.kill(llm.collective_rpc("whereabouts")[1]["pid"], signal.SIGKILL)
        assert (made(llm), llm.weights_version) == (expected(new), 2)


def test_what_cannot_be_read_changes_nothing(old: Path, new: Path, tmp_path: Path) -> None:
    """A file that is cut short is noticed before anything is read; one that goes while it is read, then."""
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=3)
    cut = Path(shutil.copytree(new, tmp_path / "cut"))
    os.truncate(cut / "model.safetensors", 1000)
    going = Path(shutil.copytree(new, tmp_path / "going"))
    with LLM(str(old), device="cpu", kv_cache_memory=1 << 22) as llm:
        with pytest.raises(CheckpointError, match="num_hidden_layers 3, not 2"):
            llm.reload(str(other))
        with pytest.raises(CheckpointError, match="is cut short"):
            llm.reload(str(cut))
        for nowhere in (str(tmp_path / "nowhere"), "~nobody-has-this-name/model"):
            with pytest.raises(CheckpointError, match="there is no such directory"):
                llm.reload(nowhere)
        llm._core.maintenance.begin(Reload(str(going), "now", 60.0))
        (going / "model.safetensors").unlink()
        while (outcome := llm._core.maintenance.turn()) is None:
            pass
        assert outcome.error is not None and "the old ones serve" in outcome.error and outcome.is_user_error
        assert (made(llm), llm.weights_version) == (expected(old), 1)
        llm.sleep(2)
        with pytest.raises(CheckpointError, match="no such directory"):
            llm.wake(str(tmp_path / "nowhere"))
        llm.wake()
        assert made(llm) == expected(old)


def test_a_wake_that_fails_can_be_tried_again(old: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(old, tmp_path / "place"))
    with LLM(str(place), device="cpu", kv_cache_memory=1 << 22) as llm:
        llm.sleep(2)
        llm._core.maintenance.begin(Wake(None))
        (place / "model.safetensors").rename(tmp_path / "away")
        while (outcome := llm._core.maintenance.turn()) is None:
            pass
        assert outcome.error is not None and "still asleep" in outcome.error
        with pytest.raises(NotNowError):
            made(llm)
        (tmp_path / "away").rename(place / "model.safetensors")
        llm.wake()
        assert made(llm) == expected(old)


def test_new_weights_in_the_same_files(old: Path, new: Path, tmp_path: Path) -> None:
    """As a training loop writes them: beside the old file, which then gives way."""
    place = Path(shutil.copytree(old, tmp_path / "place"))
    with LLM(str(place), device="cpu", kv_cache_memory=1 << 22) as llm:
        shutil.copy(new / "model.safetensors", tmp_path / "written")
        (tmp_path / "written").rename(place / "model.safetensors")
        llm.reload()
        assert (made(llm), llm.weights_version) == (expected(new), 2)
        llm.sleep(2)
        shutil.copy(old / "model.safetensors", tmp_path / "written")
        (tmp_path / "written").rename(place / "model.safetensors")
        llm.wake()
        assert (made(llm), llm.weights_version) == (expected(old), 3)
