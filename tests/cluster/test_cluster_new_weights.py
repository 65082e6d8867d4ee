"""New weights in a running model: what is generated then is what a model makes that always had them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from warm_launchers import warm_llm

from phalanx import LLM, SamplingParams
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

EXTENSION = """
from phalanx.worker.methods import remote_method

class Trainer:
    def __init__(self, worker):
        self.worker = worker

    @remote_method
    def scale_unsaid(self, part: str, factor: float) -> int:
        found = [weight for name, weight in self.worker.model.named_parameters().items() if part in name]
        for weight in found:
            weight.mul_(factor)
        return len(found)

    @remote_method(changes_weights=True)
    def scale(self, part: str, factor: float) -> int:
        return self.scale_unsaid(part, factor)
"""
PROMPT = [(7 * i) % 250 for i in range(100)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


def start(checkpoint: Path, tp_size: int, **settings: object) -> AbstractContextManager[LLM]:
    return warm_llm(
        str(checkpoint),
        device="cpu",
        tensor_parallel_size=tp_size,
        max_num_seqs=4,
        kv_cache_memory=1 << 20,
        worker_extension_cls="phalanx_trainer:Trainer",
        **settings,
    )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_new_weights_answer_from_no_old_key_or_value(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int
) -> None:
    (tmp_path / "phalanx_trainer.py").write_text(EXTENSION)
    monkeypatch.syspath_prepend(tmp_path)  # as if it were beside the script
    with start(checkpoint, tp_size, enable_prefix_caching=False) as llm:
        assert llm.collective_rpc("scale", ["k_proj", 3.0]) == [2] * tp_size
        expected = llm.generate([PROMPT], GREEDY)[0].token_ids
    with start(checkpoint, tp_size) as llm:
        old = llm.generate([PROMPT], GREEDY)[0].token_ids
        llm.collective_rpc("scale", ["k_proj", 3.0])
        first, again = llm.generate([PROMPT], GREEDY)[0], llm.generate([PROMPT], GREEDY)[0]
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96)
        assert first.token_ids == again.token_ids == expected != old
        llm.collective_rpc("scale_unsaid", ["k_proj", 1 / 3.0])
        llm.reset_prefix_cache()
        back = llm.generate([PROMPT], GREEDY)[0]
        assert back.num_cached_tokens == 0
        assert back.token_ids != expected
