"""`phalanx serve` with two replicas on one host: in lockstep and sharing experts, or each an engine of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from shared_memory_names import no_new_names

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

READY_WITHIN_S = 120.0
ENDED_WITHIN_S = 15.0
NUM_CLIENTS = 8
MAX_MODEL_LEN = 2048
MANY = 1500
"""Tokens: enough to see them come, and to end something meanwhile."""


class Served:
    """`phalanx serve --data-parallel-size 2` of a checkpoint, and its processes."""

    def __init__(self, checkpoint: Path, log: Path, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._log = log
        command = [sys.executable, "-m", "phalanx", "serve", str(checkpoint), "--port", str(self.port)]
        command += ["-dp", "2", "--max-num-seqs", "8", "--kv-cache-memory", "16MiB", "--device", "cpu"]
        command += ["--engine-restarts", "0", "--no-heal", *flags]
        with log.open("wb") as sink:
            self.server = subprocess.Popen(command, stdout=sink, stderr=sink)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def await_ready(self) -> None:
        expires_at = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < expires_at:
            assert self.server.poll() is None, self.log
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.log}")

    def family(self) -> list[psutil.Process]:
        root = psutil.Process(self.server.pid)
        return [root, *root.children(recursive=True)]

    def engines(self) -> list[psutil.Process]:
        children = psutil.Process(self.server.pid).children()
        return [child for child in children if "phalanx.engine.process" in child.cmdline()]

    def requests_running(self) -> dict[str, float]:
        return self._by_replica("phalanx_requests_running")

    def steps(self) -> dict[str, float]:
        return self._by_replica("phalanx_engine_steps_total")

    def stream(self, client: int, max_tokens: int) -> list[dict[str, Any]]:
        """The events of a stream: of a chat for every other client."""
        limits = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True, "model": "tiny"}
        if client % 2:
            path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": f"I am {client}"}]}
        else:
            path, asked = "/v1/completions", {"prompt": f"{client} is the number", "logprobs": 0}
        with self.client.stream("POST", path, json={**asked, **limits}) as response:
            assert response.status_code == 200, response.read()
            return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]

    def interrupt(self) -> None:
        """Ctrl-C: it ends in good order and leaves nothing."""
        members = self.family()
        self.server.send_signal(signal.SIGINT)
        assert self.server.wait(ENDED_WITHIN_S) == 0, self.log
        await_condition(lambda: not any(map(is_alive, members)), 2.0)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) == errno.ECONNREFUSED

    def end(self) -> None:
        self.client.close()
        if self.server.poll() is None:
            for process in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.server.wait(10)

    def _by_replica(self, name: str) -> dict[str, float]:
        found = re.findall(rf'^{name}\{{replica="(\d)"\}} (\S+)', self.client.get("/metrics").text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def await_condition(condition: Callable[[], bool], within_s: float) -> None:
    expires_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < expires_at, f"not so after {within_s} s"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(tmp_path: Path, family: str, *flags: str) -> Iterator[Served]:
    checkpoint = write_checkpoint(tmp_path / "tiny", family, max_position_embeddings=MAX_MODEL_LEN)
    with no_new_names():
        served = Served(checkpoint, tmp_path / "log", *flags)
        try:
            served.await_ready()
            yield served
        finally:
            served.end()


def are_busy(counts: dict[str, float]) -> bool:
    """Both replicas. What they count is told a few times a second."""
    return set(counts) == {"0", "1"} and min(counts.values()) > 0


def is_error(events: list[dict[str, Any]]) -> bool:
    return "error" in events[-1]


def check_streams(served: Served, num_tokens: int = 20) -> None:
    """Several at once, all of which end as they should, and have the same tokens when they are asked for one by one."""
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        together = list(clients.map(lambda client: served.stream(client, num_tokens), range(NUM_CLIENTS)))
    for client, events in enumerate(together):
        assert not is_error(events), events[-1]
        assert finish_of(events) == "length"
        if client < 2:
            assert text_of(served.stream(client, num_tokens)) == text_of(events)


def finish_of(events: list[dict[str, Any]]) -> str | None:
    return next((choice["finish_reason"] for event in reversed(events) for choice in event["choices"]), None)


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("backend", ["allgather_reducescatter", "alltoall"])
def test_a_mixture_in_lockstep(tmp_path: Path, backend: str) -> None:
    with serving(tmp_path, "mixtral", "--enable-expert-parallel", "--all2all-backend", backend) as served:
        assert len(served.engines()) == 1
        check_streams(served)
        await_condition(lambda: are_busy(served.steps()), 5.0)
        served.interrupt()


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_of_a_lockstep_group_that_fails_ends_all_with_its_name(tmp_path: Path, how: str) -> None:
    flags = ("--enable-expert-parallel", "--step-timeout-s", "2")
    with serving(tmp_path, "mixtral", *flags) as served, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        running = start_streams(served, clients)
        members, victim = served.family(), ranks_of(served)[1]
        victim.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        named = rf"rank 1 \(pid {victim.pid}\) died: killed by SIGKILL" if how == "killed" else r"\brank 1\b"
        for stream in running:
            events = stream.result(timeout=30)
            assert re.search(named, events[-1]["error"]["message"]), events[-1]
        assert served.server.wait(ENDED_WITHIN_S) == 1
        assert re.search(named, served.log)
        await_condition(lambda: not any(map(is_alive, members)), 2.0)


def start_streams(served: Served, clients: ThreadPoolExecutor) -> list[Future[list[dict[str, Any]]]]:
    """Long ones, some of which run on each replica."""
    running = [clients.submit(served.stream, client, MANY) for client in range(NUM_CLIENTS)]
    await_condition(lambda: are_busy(served.requests_running()), 20.0)
    return running


def ranks_of(served: Served) -> list[psutil.Process]:
    """In the order of their ranks, which is that of their starts."""
    children = [child for engine in served.engines() for child in engine.children()]
    (fork_server,) = [child for child in children if "phalanx.executor.fork_server" in child.cmdline()]
    return sorted(fork_server.children(), key=lambda process: process.pid)


def test_a_dense_models_replicas_run_apart(tmp_path: Path) -> None:
    with serving(tmp_path, "llama") as served:
        check_streams(served)
        await_condition(lambda: are_busy(served.steps()), 5.0)
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            running = start_streams(served, clients)
            served.engines()[1].kill()
            outcomes = [stream.result(timeout=60) for stream in running]
        assert all(finish_of(events) == "length" for events in outcomes)
        check_streams(served)
        served.interrupt()


def test_replicas_come_and_go_while_streams_run(tmp_path: Path) -> None:
    """The new one has its weights from the first, which then leaves."""
    flags = ("-dp", "1", "--threads-per-rank", "1", "--heal", "--share-weights", "always")
    with serving(tmp_path, "llama", *flags) as served:
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            undisturbed = list(clients.map(lambda client: served.stream(client, MANY), range(2)))
            running = [clients.submit(served.stream, client, MANY) for client in range(2)]
            await_condition(lambda: served.requests_running().get("0") == 2, 20.0)
            phalanx("scale", f"http://127.0.0.1:{served.port}", "2")
            assert "compute with the weights of another replica" in served.log
            running += [clients.submit(served.stream, client, MANY) for client in range(2, 5)]
            await_condition(lambda: are_busy(served.requests_running()), 20.0)
            first, second = served.engines()
            drained = phalanx("drain", f"http://127.0.0.1:{served.port}", "0", "--drain-timeout", "0")
            assert "replicas: 1, before: 2" in drained.stdout
            assert not is_alive(first)
            assert is_alive(second)
            outcomes = [stream.result(timeout=60) for stream in running]
        assert all(finish_of(events) == "length" for events in outcomes)
        assert [text_of(events) for events in outcomes[:2]] == [text_of(events) for events in undisturbed]
        assert set(served.requests_running()) == {"1"}
        served.interrupt()


def phalanx(*arguments: str) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "phalanx", *arguments], capture_output=True, text=True, timeout=READY_WITHIN_S
    )
    assert ended.returncode == 0, ended.stderr
    return ended
