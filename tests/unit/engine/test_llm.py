from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_tiny_tokenizers as tiny
import numpy as np
import pytest
from engine_echo_brain import EchoBrain

from phalanx.config import Config
from phalanx.errors import ConfigError, EngineDeadError, RequestError, ResizeError, StartError
from phalanx.llm import LLM
from phalanx.membership.resize import LineResize, Size
from phalanx.protocol.client import Submit, TokenBatch
from phalanx.protocol.sampling import SamplingParams

MAX_MODEL_LEN = 1000
VOCAB_SIZE = 320
"""The model's; the tokenizer has one more."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    return tiny.save(tiny.byte_level(), tmp_path, chat_template=tiny.CHAT_TEMPLATE)


class FakeFormation:
    """Its ranks have two methods, of which one changes the weights."""

    capacity = SimpleNamespace(num_blocks=10, max_model_len=MAX_MODEL_LEN)

    def __init__(self, config: Config) -> None:
        self.config = config

    def collective_rpc(self, method: str, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(result=lambda: ["push"] if method == "methods_that_change_weights" else [method])

    def heals(self, error: Exception) -> bool:
        return False

    def progressed(self) -> None: ...

    def weights_changed(self) -> None: ...

    def check_health(self, timeout_s: float) -> None: ...

    def on_failure(self, callback: Any) -> None: ...

    @property
    def size(self) -> Size:
        return Size(1, 1)

    def begin_resize(self, asked: Size) -> LineResize:
        self.resize = LineResize(self.size, asked)
        return self.resize

    def follow_resize(self, timeout_s: float) -> None:
        becomes_of_it = {2: "ready", 3: "failed"}
        self.resize.error = StartError("rank 2", "loading", "no memory") if self.resize.asked[0] == 3 else None
        self.resize.state = becomes_of_it[self.resize.asked[0]]

    def switch(self) -> Any:
        config = Config.build(model="m", data_parallel_size=2, enable_expert_parallel=True)
        return SimpleNamespace(epoch=2, config=config, capacity=self.capacity)

    def __enter__(self) -> FakeFormation:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def faked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads no model."""
    monkeypatch.setattr(
        "phalanx.llm.resolve", lambda model, **_: SimpleNamespace(path=checkpoint, vocab_size=VOCAB_SIZE)
    )
    monkeypatch.setattr("phalanx.engine.core.start_formation", lambda config, *_: FakeFormation(config))
    monkeypatch.setattr("phalanx.engine.core.Brain", EchoBrain)


@pytest.fixture
def llm(checkpoint: Path, faked: None) -> Iterator[LLM]:
    with LLM(str(checkpoint)) as llm:
        yield llm


@pytest.fixture
def extended(checkpoint: Path, faked: None) -> Iterator[LLM]:
    with LLM(str(checkpoint), worker_extension_cls="probes:Probe") as llm:
        yield llm


def brain_of(llm: LLM) -> Any:
    return llm._core.brain


def test_one_prompt_gives_a_list_of_one(llm: LLM) -> None:
    (completion,) = llm.generate("fox", SamplingParams(max_tokens=2 * len(llm.tokenizer.encode("fox"))))
    assert (completion.prompt, completion.text, completion.finish_reason) == ("fox", "foxfox", "length")
    assert completion.num_prompt_tokens == len(llm.tokenizer.encode("fox"))


def test_completions_come_in_the_order_of_the_prompts_whoever_ends_first(llm: LLM) -> None:
    prompts = ["the fox", "a", "the lazy dog"]
    samplings = [SamplingParams(max_tokens=len(llm.tokenizer.encode(prompt))) for prompt in prompts]
    assert [completion.text for completion in llm.generate(prompts, samplings)] == prompts


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    ids = llm.tokenizer.encode("fox")
    sampling = SamplingParams(max_tokens=len(ids))
    assert [completion.text for completion in llm.generate(ids, sampling)] == ["fox"]
    assert llm.generate([ids, "dog"], sampling)[0].text == "fox"


def test_a_stop_string_ends_its_request_alone(llm: LLM) -> None:
    stopped, whole = llm.generate(
        ["the fox", "a fox"], [SamplingParams(stop=("fox",), max_tokens=None), SamplingParams(max_tokens=8)]
    )
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("the ", "stop", "fox")
    assert (len(whole.token_ids), whole.finish_reason) == (8, "length")
    assert len(brain_of(llm).cancelled) == 1
    assert not brain_of(llm).has_work()


def test_chat_goes_through_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    one, other = llm.chat([conversation, conversation], SamplingParams(max_tokens=3))
    assert one.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert one.token_ids == other.token_ids
    assert len(llm.chat(conversation, SamplingParams(max_tokens=3))) == 1


def test_without_sampling_the_checkpoints_advice_holds(llm: LLM) -> None:
    seen: list[SamplingParams] = []
    brain = brain_of(llm)
    submit = brain.submit
    brain.submit = lambda request: (seen.append(request.sampling), submit(request))
    llm.generate("fox")
    assert (seen[0].temperature, seen[0].max_tokens) == (0.6, 16)


def test_a_wrong_request_is_refused_before_anything_is_computed(llm: LLM) -> None:
    for prompts, sampling, field in (
        (["fox", ""], SamplingParams(), "prompt"),
        (["fox"], SamplingParams(max_tokens=MAX_MODEL_LEN), "max_tokens"),
        (["fox"], [SamplingParams()] * 2, "sampling"),
    ):
        with pytest.raises(RequestError) as caught:
            llm.generate(prompts, sampling)
        assert caught.value.field == field
    assert brain_of(llm).num_steps == 0


@pytest.mark.parametrize(
    ("prompts", "sampling", "field"),
    [
        (None, None, "prompts"),
        (1.5, None, "prompts"),
        (b"fox", None, "prompts"),
        ({"prompt": "fox"}, None, "prompts"),
        ([1.5], None, "prompt"),
        ([None], None, "prompt"),
        ([b"fox"], None, "prompt"),
        ([1, 1.5], None, "prompt"),
        (["fox", [1, "a"]], None, "prompt"),
        ("\ud800", None, "prompt"),
        ([VOCAB_SIZE], None, "prompt"),
        ("fox", 0.5, "sampling"),
        ("fox", {"temperature": 0}, "sampling"),
        ("fox", [None], "sampling"),
        ("fox", SamplingParams(stop="abc"), "stop"),  # type: ignore[arg-type]
        ("fox", SamplingParams(max_tokens=1.5), "max_tokens"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_request_is_refused_and_harms_nothing(llm: LLM, prompts: Any, sampling: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(prompts, sampling)
    assert caught.value.field == field
    assert llm.generate("fox", SamplingParams(max_tokens=1))[0].finish_reason == "length"


@pytest.mark.parametrize("messages", [None, "hi", {"role": "user", "content": "hi"}, [["hi"]], [None], ["hi"]])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        llm.chat(messages)
    assert caught.value.field == "messages"


def test_token_ids_of_numpy_and_lists_in_sampling_are_as_good(llm: LLM) -> None:
    ids = llm.tokenizer.encode("fox")
    given: Any = SamplingParams(max_tokens=len(ids), stop=["x!"], stop_token_ids=[3])  # type: ignore[arg-type]
    (completion,) = llm.generate(list(np.array(ids)), given)
    assert completion.text == "fox"


def test_default_sampling_gives_way_where_the_limit_is_near(llm: LLM) -> None:
    prompt = [5] * (MAX_MODEL_LEN - 3)
    near, far = llm.generate([prompt, [5]])
    assert (len(near.token_ids), len(far.token_ids)) == (3, 16)
    with pytest.raises(RequestError, match="max_tokens"):
        llm.generate(prompt, SamplingParams())


def test_a_request_that_the_brain_refuses_ends_alone(llm: LLM) -> None:
    brain = brain_of(llm)
    submit = brain.submit

    def refuse_first(request: Submit) -> None:
        if request.request_id == 0:
            raise RequestError("prompt", "9 tokens", "at most 8")
        submit(request)

    brain.submit = refuse_first
    refused, other = llm.generate(["fox", "dog"], SamplingParams(max_tokens=1))
    assert refused.finish_reason == "error"
    assert "at most 8" in (refused.error or "")
    assert other.finish_reason == "length"


def test_an_unknown_setting_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        LLM(str(checkpoint), tensor_paralel_size=2)


def test_ctrl_c_lets_the_step_end_and_the_llm_live(llm: LLM) -> None:
    brain = brain_of(llm)
    step = brain.step
    ended_steps: list[int] = []

    def interrupted_step() -> TokenBatch | None:
        if brain.num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        batch: TokenBatch | None = step()
        ended_steps.append(brain.num_steps)
        return batch

    brain.step = interrupted_step
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["fox", "dog"], SamplingParams(max_tokens=None))
    assert 4 in ended_steps
    assert len(brain.cancelled) == 2
    assert not brain.has_work()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    brain.step = step
    assert llm.generate("fox", SamplingParams(max_tokens=1))[0].finish_reason == "length"


def failing_step() -> TokenBatch | None:
    raise RuntimeError("rank 1 is gone")


def test_after_a_fault_the_llm_says_why_it_can_run_no_more(checkpoint: Path, faked: None) -> None:
    with LLM(str(checkpoint), engine_restarts=0) as llm:
        brain_of(llm).step = failing_step
        with pytest.raises(RuntimeError):
            llm.generate("fox")
        with pytest.raises(EngineDeadError, match="rank 1 is gone"):
            llm.generate("fox")


def test_after_a_fault_the_model_is_loaded_again_and_outputs_go_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, num_loads = brain_of(llm), 0

    def fail_after_a_while() -> TokenBatch | None:
        return failing_step() if first.num_steps == 4 else EchoBrain.step(first)

    def load_at_the_second_attempt(config: Config, *_: Any) -> Any:
        nonlocal num_loads
        num_loads += 1
        if num_loads == 1:
            raise StartError("rank 0", "loading", "no memory")
        return FakeFormation(config)

    monkeypatch.setattr("phalanx.engine.restarts.FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("phalanx.engine.core.start_formation", load_at_the_second_attempt)
    first.step = fail_after_a_while
    num_tokens = 3 * len(llm.tokenizer.encode("the fox 🦊"))
    completions = llm.generate(["the fox 🦊", "the fox 🦊"], SamplingParams(max_tokens=num_tokens))
    assert [completion.text for completion in completions] == 2 * [3 * "the fox 🦊"]
    assert brain_of(llm) is not first and not brain_of(llm).has_work()
    assert caplog.messages[0] == "RuntimeError: rank 1 is gone; the model is loaded again, for 2 requests"
    assert "no memory" in caplog.messages[1]


def test_what_cannot_be_loaded_again_ends_the_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise StartError("rank 0", "loading", "no memory")

    told: list[Exception] = []
    llm.on_failure(told.append)
    monkeypatch.setattr("phalanx.engine.restarts.FIRST_DELAY_S", 0.01)
    monkeypatch.setattr("phalanx.engine.core.start_formation", refuse)
    brain_of(llm).step = failing_step
    with pytest.raises(StartError, match="no memory"):
        llm.generate("fox")
    with pytest.raises(EngineDeadError, match="no memory"):
        llm.generate("fox")
    assert len(told) == 1
    llm.on_failure(told.append)
    assert len(told) == 2


def test_workers_that_know_more_than_the_checkpoint_are_not_made_anew(extended: LLM) -> None:
    brain_of(extended).step = failing_step
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        extended.generate("fox")


def test_changed_weights_are_not_exchanged_for_the_checkpoints(llm: LLM) -> None:
    llm.reset_prefix_cache()
    brain_of(llm).step = failing_step
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        llm.generate("fox")


def test_restarts_that_would_not_happen_are_no_silent_option(
    checkpoint: Path, faked: None, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (0, 3):
        LLM(str(checkpoint), worker_extension_cls="probes:Probe", engine_restarts=asked).close()
    assert not caplog.messages
    LLM(str(checkpoint), worker_extension_cls="probes:Probe", engine_restarts=9).close()
    assert "engine_restarts = 9 has no effect" in caplog.text


def test_a_closed_llm_says_so(llm: LLM) -> None:
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("fox")


def test_new_weights_reset_the_prefix_cache_when_they_are_sent(extended: LLM) -> None:
    assert extended.collective_rpc("norm") == ["norm"]
    assert brain_of(extended).num_resets == 0
    assert extended.collective_rpc("push") == ["push"]
    assert brain_of(extended).num_resets == 1
    pending = extended.collective_rpc("push", non_block=True)
    assert brain_of(extended).num_resets == 2, "what is generated before the answer is computed with them"
    assert pending.result() == ["push"]
    extended.reset_prefix_cache()
    assert brain_of(extended).num_resets == 3


def test_an_llm_that_has_ended_calls_no_methods(extended: LLM) -> None:
    extended.check_health()
    extended.close()
    for call in (lambda: extended.collective_rpc("norm"), extended.reset_prefix_cache, extended.check_health):
        with pytest.raises(EngineDeadError, match="closed"):
            call()


def test_progress_goes_to_the_end(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["fox", "dog"], SamplingParams(max_tokens=4), progress=True)
    assert "2/2" in capsys.readouterr().err


def test_no_prompts_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_another_size(llm: LLM) -> None:
    told: list[Any] = []
    brain_of(llm).restructure = lambda *given, **_: told.append(given)
    llm.resize()
    with pytest.raises(ResizeError, match="from DP 1, TP 1 to DP 3, TP 1: rank 2 did not start"):
        llm.resize(data_parallel_size=3)
    assert not told and llm.config.parallel.data_parallel_size == 1
    llm.resize(data_parallel_size=2)
    assert [epoch for _, epoch in told] == [2] and llm.config.parallel.data_parallel_size == 2
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        llm.resize(tensor_parallel_size=0)
