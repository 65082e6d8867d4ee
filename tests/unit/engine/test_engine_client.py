from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import engine_fake_process
import engine_tiny_tokenizers as tiny
import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from phalanx.config import Config
from phalanx.engine.child import EngineChild
from phalanx.engine.client import EngineClient
from phalanx.engine.stream import OutputDelta, RequestStream
from phalanx.errors import ConfigError, EngineDeadError, RequestError, StartError, UserError
from phalanx.protocol.client import StartProgress
from phalanx.protocol.sampling import SamplingParams
from phalanx.server.api_keys import ApiKeys
from phalanx.server.app import create_app
from phalanx.server.service import Service
from phalanx.transport.liveness import is_running

TIMEOUT_S = 30.0
ENDLESS = SamplingParams(max_tokens=None)
MODEL_VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    (directory / "config.json").write_text(f'{{"vocab_size": {MODEL_VOCAB_SIZE}}}')
    return tiny.save(tiny.byte_level(), directory)


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pids of the engines that were started."""
    pids: list[int] = []
    spawn = EngineChild.spawn

    def noted_spawn(*arguments: Any) -> EngineChild:
        child = spawn(*arguments)
        pids.append(child.pid)
        return child

    monkeypatch.setattr(EngineChild, "spawn", noted_spawn)
    return pids


def command(behaviour: str) -> tuple[str, ...]:
    return (sys.executable, engine_fake_process.__file__, behaviour)


@asynccontextmanager
async def client_of(checkpoint: Path, behaviour: str = "healthy", **settings: Any) -> AsyncIterator[EngineClient]:
    """Of an engine that is not started again, unless `engine_restarts` says so."""
    async with asyncio.timeout(TIMEOUT_S):
        config = Config.build(model=str(checkpoint), **{"engine_restarts": 0, **settings})
        client = await EngineClient.start(config, command=command(behaviour))
        try:
            yield client
        finally:
            await client.close()
            assert not is_running(client.condition.pid)


async def text_of(client: EngineClient, text: str, sampling: SamplingParams) -> tuple[str, OutputDelta]:
    shown, last = "", None
    async for delta in client.generate(client.tokenizer.encode(text), sampling):
        shown, last = shown + delta.text, delta
    assert last is not None
    return shown, last


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the fake engine reports by itself; the test's own timeout ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.001)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test in a loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@in_loop
async def test_output_comes_as_text(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        num_tokens = len(client.tokenizer.encode("the fox 🦊"))
        text, last = await text_of(client, "the fox 🦊", SamplingParams(max_tokens=num_tokens))
        assert text == "the fox 🦊"
        assert last.finish_reason == "length"
        assert client.num_running == 0
        assert client.info.max_model_len == engine_fake_process.MAX_MODEL_LEN
        assert client.default_sampling.temperature == 0.6


@in_loop
async def test_200_streams_at_a_time_do_not_mix(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:

        async def one(number: int) -> None:
            text = f"fox {number} runs. "
            num_tokens = 5 * len(client.tokenizer.encode(text))
            assert (await text_of(client, text, SamplingParams(max_tokens=num_tokens)))[0] == 5 * text

        await asyncio.gather(*map(one, range(200)))
        assert client.num_running == 0


@in_loop
async def test_a_stop_string_ends_the_request_in_the_engine_too(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        text, last = await text_of(client, "the quick fox", SamplingParams(max_tokens=None, stop=("fox",)))
        assert (text, last.finish_reason, last.stop_reason) == ("the quick ", "stop", "fox")
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_generated_tokens == 1)


@in_loop
async def test_closing_the_iterator_cancels(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        async with aclosing(client.generate(client.tokenizer.encode("fox"), ENDLESS)) as deltas:
            async for _ in deltas:
                break
            assert client.num_running == 1
        assert client.num_running == 0
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_generated_tokens == 1)


@in_loop
async def test_cancelling_the_reading_task_cancels(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        task = asyncio.create_task(text_of(client, "fox", ENDLESS))
        await until(lambda: client.num_running == 1)
        task.cancel()
        await asyncio.wait([task])
        assert client.num_running == 0
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_generated_tokens == 1)


@in_loop
async def test_a_slow_reader_gets_merged_deltas_and_misses_nothing(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        prompt = client.tokenizer.encode("the quick brown fox. ")
        num_tokens = 50 * len(prompt)
        deltas = client.generate(prompt, SamplingParams(max_tokens=num_tokens))
        first = await anext(deltas)
        await until(lambda: client.num_running == 0)
        rest = [delta async for delta in deltas]
        assert len(rest) == 1
        assert first.text + rest[0].text == 50 * "the quick brown fox. "
        assert len(first.token_ids + rest[0].token_ids) == num_tokens
        assert rest[0].finish_reason == "length"


@in_loop
async def test_wrong_requests_are_refused_at_once(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        limit, highest = engine_fake_process.MAX_MODEL_LEN, client.tokenizer.vocab_size - 1
        for prompt, sampling, field in (
            ([], SamplingParams(), "prompt"),
            ([1] * limit, SamplingParams(), "prompt"),
            ([highest + 1], SamplingParams(), "prompt"),
            ([-1], SamplingParams(), "prompt"),
            ([1, 2], SamplingParams(max_tokens=limit - 1), "max_tokens"),
            ([1], SamplingParams(temperature=-1.0), "temperature"),
        ):
            with pytest.raises(RequestError) as caught:
                client.generate(prompt, sampling)
            assert caught.value.field == field
        client.generate([1, highest], SamplingParams(max_tokens=limit - 2))


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([1.5], {}, "prompt"),
        ([1], {"stop": "abc"}, "stop"),
        ([1], {"stop": ("\ud800",)}, "stop"),
        ([1], {"max_tokens": 1.5}, "max_tokens"),
    ],
)
@in_loop
async def test_what_cannot_be_sent_is_refused_and_harms_nobody(
    checkpoint: Path, prompt: Any, sampling: Any, field: str
) -> None:
    async with client_of(checkpoint) as client:
        with pytest.raises(RequestError) as caught:
            async for _ in client.generate(prompt, SamplingParams(**sampling)):
                pass
        assert caught.value.field == field
        assert (await text_of(client, "fox", SamplingParams(max_tokens=1)))[1].finish_reason == "length"


@in_loop
async def test_a_token_that_only_the_tokenizer_has_is_refused(tmp_path: Path) -> None:
    tiny.save(tiny.byte_level(), tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    async with client_of(tmp_path) as client:
        assert client.tokenizer.vocab_size > 300
        with pytest.raises(RequestError, match="from 0 to 299"):
            client.generate([300], ENDLESS)
        client.generate([299], ENDLESS)


@in_loop
async def test_when_nothing_can_be_sent_any_more_nobody_waits(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        client._incarnation._stream._max_frame_bytes = 1000
        with pytest.raises(EngineDeadError, match=r"nothing can be sent.*1000"):
            await text_of(client, "fox", SamplingParams(stop=("x" * 1000,), max_tokens=1))


@in_loop
async def test_an_engine_goes_on_with_what_another_one_has_let_go(checkpoint: Path) -> None:
    async with client_of(checkpoint) as first, client_of(checkpoint) as second:
        prompt = first.tokenizer.encode("the quick brown fox. ")
        stream = RequestStream(first.tokenizer, prompt, SamplingParams(max_tokens=50 * len(prompt)))
        deltas = []
        async for delta in first.follow(stream):
            first.release(stream)
            deltas.append(delta)
        assert 0 < sum(len(delta.token_ids) for delta in deltas) < 50 * len(prompt)
        assert first.num_running == 0
        deltas += [delta async for delta in second.follow(stream)]
        assert "".join(delta.text for delta in deltas) == 50 * "the quick brown fox. "
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        await until(lambda: first.stats is not None and first.stats.replicas[0].num_generated_tokens == 1)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("dies-in-step-5", "killed by SIGKILL"), ("fails-in-step-5", "step 5: rank 0 died")],
)
@in_loop
async def test_a_dead_engine_ends_every_stream_and_says_why(checkpoint: Path, behaviour: str, reason: str) -> None:
    async with client_of(checkpoint, behaviour) as client:
        results = await asyncio.gather(*(text_of(client, "fox", ENDLESS) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) and reason in str(result) for result in results), results
        assert client.dead is not None
        with pytest.raises(EngineDeadError, match=reason):
            client.generate([1], ENDLESS)


@in_loop
async def test_an_engine_killed_from_outside_is_noticed_at_once(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        deltas = client.generate(client.tokenizer.encode("fox"), ENDLESS)
        await anext(deltas)
        os.kill(client.condition.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            async for _ in deltas:
                pass
        assert time.monotonic() - killed_at < 1.0


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `step_timeout_s` of half a second, silence is noticed after one and a half."""
    monkeypatch.setattr("phalanx.engine.incarnation.SILENCE_GRACE_S", 1.0)


@pytest.mark.parametrize("behaviour", ["stops-in-step-5", "hangs-in-step-5"])
@in_loop
async def test_a_silent_engine_is_noticed_and_killed_and_health_tells(
    checkpoint: Path, behaviour: str, short_grace: None
) -> None:
    async with client_of(checkpoint, behaviour, step_timeout_s=0.5) as client:
        service = Service(client, "m")
        app = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service, ApiKeys(()))), base_url="http://m")
        began_at = time.monotonic()
        assert (await app.get("/health")).status_code == 200
        results = await asyncio.gather(*(text_of(client, "fox", ENDLESS) for _ in range(5)), return_exceptions=True)
        assert 1.5 <= time.monotonic() - began_at < 4.0
        reason = rf"the engine's process \(pid {client.condition.pid}\) was silent for [1-3]\.?\d* s, .*: it was killed"
        for result in results:
            assert isinstance(result, EngineDeadError) and re.fullmatch(reason, str(result)), result
        health = await app.get("/health")
        assert health.status_code == 503 and "was silent for" in health.text
        assert await client._incarnation._child.wait(1.0)
        with pytest.raises(EngineDeadError, match=reason):
            client.generate([1], ENDLESS)


@in_loop
async def test_silence_tells_how_far_the_engine_had_come(checkpoint: Path, short_grace: None) -> None:
    async with client_of(checkpoint, step_timeout_s=0.5) as client:
        await text_of(client, "fox", SamplingParams(max_tokens=3))
        await until(lambda: client.stats is not None and client.stats.replicas[0].num_steps == 3)
        os.kill(client.condition.pid, signal.SIGSTOP)
        await until(lambda: client.dead is not None)
        assert "after 3 steps" in str(client.dead)


@in_loop
async def test_an_idle_engine_and_a_long_step_are_not_silence(checkpoint: Path, short_grace: None) -> None:
    async with client_of(checkpoint, "takes-long-steps", step_timeout_s=0.5) as client:
        await asyncio.sleep(2.0)
        await text_of(client, "fox", SamplingParams(max_tokens=2))
        assert client.dead is None


@in_loop
async def test_what_keeps_the_client_from_listening_is_not_silence(checkpoint: Path, short_grace: None) -> None:
    async with client_of(checkpoint, step_timeout_s=0.5) as client:
        for _ in range(2):
            time.sleep(2.0)
            await asyncio.sleep(0)
        assert client.dead is None
        await text_of(client, "fox", SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    ("behaviour", "kind", "reason"),
    [
        ("wrong-setting", ConfigError, "block_size: 7 is not possible: 16 or 32"),
        ("wrong-checkpoint", UserError, "no config"),
        ("broken-worker", StartError, "boom.*while loading"),
        ("dies-at-start", StartError, "killed by SIGKILL.*while loading"),
    ],
)
@in_loop
async def test_a_failed_start_says_why(checkpoint: Path, behaviour: str, kind: type[Exception], reason: str) -> None:
    seen: list[StartProgress] = []
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(kind, match=reason):
            await EngineClient.start(Config.build(model=str(checkpoint)), seen.append, command=command(behaviour))
    assert seen == [StartProgress(0, "loading", 1, 2)]


@in_loop
async def test_a_program_that_cannot_run_is_a_failed_start(checkpoint: Path) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(StartError, match="exit code 7"):
            await EngineClient.start(
                Config.build(model=str(checkpoint)), command=(sys.executable, "-c", "import sys; sys.exit(7)")
            )


@pytest.mark.slow  # what is no tokenizer.json goes through AutoTokenizer, which imports torch
@in_loop
async def test_a_missing_tokenizer_ends_the_start_and_the_engine(tmp_path: Path, spawned: list[int]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(UserError, match="no tokenizer"):
            await EngineClient.start(Config.build(model=str(tmp_path)), command=command("hangs-at-start"))
    assert not is_running(spawned[0])


@in_loop
async def test_a_cancelled_start_leaves_no_process(checkpoint: Path, spawned: list[int]) -> None:
    loading = asyncio.Event()
    start = asyncio.create_task(
        EngineClient.start(
            Config.build(model=str(checkpoint)), lambda _: loading.set(), command=command("hangs-at-start")
        )
    )
    async with asyncio.timeout(TIMEOUT_S):
        await loading.wait()
        start.cancel()
        await asyncio.wait([start])
    assert start.cancelled()
    assert not is_running(spawned[0])


@in_loop
async def test_silence_at_start_has_a_deadline(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.incarnation.START_GRACE_S", 0.5)
    config = Config.build(model=str(checkpoint), start_timeout_s=0.5)
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(StartError, match="nothing was heard"):
            await EngineClient.start(config, command=command("hangs-at-start"))


@in_loop
async def test_close_lets_running_requests_end_in_their_grace(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        task = asyncio.create_task(text_of(client, "fox", SamplingParams(max_tokens=2000)))
        await until(lambda: client.num_running == 1)
        closing = asyncio.create_task(client.close(grace_s=TIMEOUT_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shutting down"):
            client.generate([1], ENDLESS)
        assert (await task)[1].finish_reason == "length"
        await closing


@in_loop
async def test_close_cancels_what_outlasts_its_grace(checkpoint: Path) -> None:
    async with client_of(checkpoint) as client:
        task = asyncio.create_task(text_of(client, "fox", ENDLESS))
        await until(lambda: client.num_running == 1)
        await client.close(grace_s=0.05)
        assert (await task)[1].finish_reason == "cancelled"
        assert client.dead is not None


@in_loop
async def test_an_engine_that_does_not_end_is_killed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.incarnation.SHUTDOWN_TIMEOUT_S", 0.1)
    async with client_of(checkpoint, "ignores-shutdown") as client:
        await client.close()
        assert not is_running(client.condition.pid)


@in_loop
async def test_the_real_process_tells_of_a_missing_model(tmp_path: Path, spawned: list[int]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(UserError, match="no such file"):
            await EngineClient.start(Config.build(model=str(tmp_path / "nothing-here")))
    assert not is_running(spawned[0])


@in_loop
async def test_the_real_process_tells_which_setting_is_wrong(tmp_path: Path, spawned: list[int]) -> None:
    tiny.save(tiny.byte_level(), tmp_path)
    shape = {"max_position_embeddings": 64, "num_hidden_layers": 2, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    save_file({"x": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(ConfigError) as caught:
            await EngineClient.start(Config.build(model=str(tmp_path), max_model_len=1000))
    assert (caught.value.field, caught.value.value) == ("max_model_len", 1000)
    assert caught.value.allowed == "this model goes up to 64"
    assert not is_running(spawned[0])


@pytest.mark.parametrize("failing", ["subprocess.Popen", "os.pidfd_open"])
@in_loop
async def test_a_spawn_that_fails_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    num_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(failing, refuse)
    with pytest.raises(OSError, match="too many"):
        EngineChild.spawn((sys.executable, "-c", ""))
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_the_engine_dies_with_its_server_even_while_it_is_stopped() -> None:
    code = (
        "import asyncio\n"
        "from phalanx.engine.child import EngineChild\n"
        "async def main():\n"
        "    print(EngineChild.spawn().pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        wait_until(lambda: ignores(pid, signal.SIGINT), 10.0)
        os.kill(pid, signal.SIGSTOP)
        server.kill()
        wait_until(lambda: not is_running(pid), 2.0)


def ignores(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    expires_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < expires_at, "it did not happen"
        time.sleep(0.005)
