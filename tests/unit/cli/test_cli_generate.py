"""`phalanx generate` with an engine that answers what a test says."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.cli import main
from phalanx.config import Config
from phalanx.engine import fleet
from phalanx.engine.stream import OutputDelta
from phalanx.errors import CheckpointError, RequestError
from phalanx.protocol.client import StartProgress
from phalanx.protocol.sampling import SamplingParams


class EchoTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages))


class EchoEngine:
    """Answers each prompt with itself in capitals; long prompts take longer."""

    latest: EchoEngine

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer = EchoTokenizer()
        self.default_sampling = SamplingParams(temperature=0.6, top_k=9)
        self.asked: list[SamplingParams] = []
        self.last: dict[str, Any] = {"finish_reason": "stop"}
        self.info = SimpleNamespace(max_model_len=1000)
        self.is_closed = False

    @classmethod
    async def start(cls, config: Config, on_progress: Any = None) -> EchoEngine:
        if config.model.model == "missing":
            raise CheckpointError("missing: no such model")
        on_progress(StartProgress(0, "loading weights", 1, 2))
        on_progress(StartProgress(0, "loading weights", 2, 2))
        EchoEngine.latest = cls(config)
        if config.model.model == "failing":
            EchoEngine.latest.last = {"finish_reason": "error", "error": "no room"}
        return EchoEngine.latest

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        self.asked.append(sampling)
        for token in prompt[:-1]:
            await asyncio.sleep(0)
            yield OutputDelta(text=chr(token).upper(), token_ids=(token,))
        if self.config.model.model == "refusing" and prompt == [ord("b")]:
            raise RequestError("prompt", "b", "no such prompt")
        yield OutputDelta(text=chr(prompt[-1]).upper(), token_ids=(prompt[-1],), **self.last)

    async def close(self, grace_s: float = 0.0) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def _echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "start_engine", EchoEngine.start)


def test_one_prompt_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "m", "hello", "--temperature", "0", "--stop", "a", "--stop", "b", "-tp", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "HELLO\n"
    assert err == "rank 0: loading weights\n"
    engine = EchoEngine.latest
    (sampling,) = engine.asked
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.stop) == (0.0, 9, 256, ("a", "b"))
    assert engine.config.parallel.tensor_parallel_size == 2
    assert engine.is_closed


@pytest.mark.parametrize(("given", "asked"), [([], 10), (["--max-tokens", "20"], 20)])
def test_the_default_limit_gives_way_near_the_models_own(given: list[str], asked: int) -> None:
    assert main.run(["generate", "m", "x" * 990, *given]) == 0
    assert [sampling.max_tokens for sampling in EchoEngine.latest.asked] == [asked]


def test_chat(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "m", "hi", "--chat", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "<USER>HI\n"
    assert EchoEngine.latest.asked[0].max_tokens == 3


def test_several_prompts_come_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "m", "a long one", "b"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {
            "index": 0, "prompt": "a long one", "text": "A LONG ONE", "finish_reason": "stop",
            "num_prompt_tokens": 10, "num_output_tokens": 10,
        },
        {
            "index": 1, "prompt": "b", "text": "B", "finish_reason": "stop",
            "num_prompt_tokens": 1, "num_output_tokens": 1,
        },
    ]  # fmt: skip


def test_a_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    output = tmp_path / "out.jsonl"
    assert main.run(["generate", "m", "--file", str(tmp_path / "prompts.txt"), "--output", str(output)]) == 0
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == ["ONE", "TWO"]
    assert capsys.readouterr().out == ""


def test_a_file_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = [{"role": "user", "content": "hey"}]
    rows = [{"id": "first", "prompt": "one"}, {"messages": conversation}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main.run(["generate", "m", "-f", str(tmp_path / "in.jsonl")]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["text"]) == ("first", "ONE")
    assert (second["messages"], second["text"]) == (conversation, "<USER>HEY")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n{"promt": "b"}', "in.jsonl:2"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ("hello", "in.jsonl:1"),
    ],
)
def test_a_wrong_file(tmp_path: Path, content: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert main.run(["generate", "m", "-f", str(tmp_path / "in.jsonl")]) == 2
    assert says in capsys.readouterr().err


def test_a_line_of_json_may_have_any_separator_in_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a\u2028b", "c\x85d"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "in.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert main.run(["generate", "m", "-f", str(tmp_path / "in.jsonl")]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.split("\n") if line] == prompts


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
def test_a_failed_request_fails_the_command(prompts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "failing", *prompts]) == 1
    assert "no room" in capsys.readouterr().err
    assert EchoEngine.latest.is_closed


def test_without_a_standard_output_a_file_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        assert main.run(["generate", "m", "a"]) == 2
    assert "standard output is closed: name a file with --output" in capsys.readouterr().err


def test_a_refused_prompt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "refusing", "a", "b"]) == 2
    assert "prompt (index 1): 'b' is not possible: no such prompt" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["missing", "failing"])
def test_until_there_is_an_output_a_file_stays_as_it_is(model: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("the outputs of yesterday")
    for name in ("old", "new"):
        assert main.run(["generate", model, "a", "--output", str(tmp_path / name)]) != 0
    assert (tmp_path / "old").read_text() == "the outputs of yesterday"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_output_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("the outputs of yesterday" * 1000)
    assert main.run(["generate", "m", "a", "b", "--output", str(tmp_path / "old")]) == 0
    assert [json.loads(line)["text"] for line in (tmp_path / "old").read_text().splitlines()] == ["A", "B"]


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "missing", "a"]) == 2
    assert capsys.readouterr().err == "phalanx: error: missing: no such model\n"


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, phalanx.cli.generate; sys.exit('torch' in sys.modules or 'phalanx.worker' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("flag", ["--logprobs", "--served-model-name"])
def test_what_would_change_nothing_is_no_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "m", "a", flag, "1"]) == 2
    assert flag in capsys.readouterr().err
