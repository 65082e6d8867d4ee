"""`phalanx serve` whose engine is killed: its clients see a pause, and nothing is left when it ends."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from shared_memory_names import new_names

from phalanx.ledger.instance import server_of, shown_by
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

READY_WITHIN_S = 120.0
GONE_WITHIN_S = 2.0
NUM_TOKENS = 250
ASKED: list[dict[str, Any]] = [
    {"prompt": "once upon a time", "temperature": 0.0, "logprobs": 2},
    {"prompt": "die Füchsin 🦊", "temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"prompt": "und dann", "temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "presence_penalty": 0.5},
]


class Server:
    """With two ranks, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.log = folder / "log"
        command = [sys.executable, "-m", "phalanx", "serve", str(write_checkpoint(folder / "llama"))]
        command += ["--port", str(port), "-tp", "2", "--max-num-seqs", "8", "--kv-cache-memory", "16MiB"]
        command += ["--device", "cpu"]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=READY_WITHIN_S)

    def await_health(self, status: str) -> dict[str, Any]:
        expires_at = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < expires_at:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                response = self.client.get("/health")
                body: dict[str, Any] = response.json()
                assert response.status_code == (200 if body["status"] == "ok" else 503)
                if body["status"] == status:
                    return body
            time.sleep(0.01)
        raise AssertionError(f"not {status}: {self.log.read_text()}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def stream(self, asked: dict[str, Any], on_event: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """All of its choice that came, put together, and the usage."""
        limits = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
        body = {**asked, **limits, "stream_options": {"include_usage": True}}
        text, tokens, reasons, usage = "", [], [], None
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                on_event()
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    text += choice["text"]
                    tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
                    reasons.append(choice["finish_reason"])
        assert reasons[-1] == "length" and not any(reasons[:-1])
        return {"text": text, "tokens": tokens, "usage": usage}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = set(os.listdir("/dev/shm"))
    server = Server(tmp_path_factory.mktemp("served"))
    members: list[psutil.Process] = []
    try:
        server.await_health("ok")
        yield server
    finally:
        server.client.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            members = server.family()
        server.process.kill()
        server.process.wait(10)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    assert not new_names(before)


def test_streams_are_those_of_an_engine_that_lives(server: Server) -> None:
    with ThreadPoolExecutor(len(ASKED)) as threads:
        expected = list(threads.map(server.stream, ASKED))
    first = [server.engine(), *server.engine().children(recursive=True)]
    assert len(first) >= 4, "engine, fork server, ranks"
    num_events = itertools.count()
    begun = threading.Event()

    def note() -> None:
        if next(num_events) == 60:
            begun.set()

    with ThreadPoolExecutor(len(ASKED) + 1) as threads:
        running = [threads.submit(server.stream, asked, note) for asked in ASKED]
        assert begun.wait(30.0)
        first[0].kill()
        body = server.await_health("restarting")
        assert "killed by SIGKILL" in body["error"]["message"]
        late = threads.submit(server.client.post, "/v1/completions", json={"prompt": "a", "max_tokens": 3})
        found = [future.result() for future in running]
        assert late.result().status_code == 200
    for one, other in zip(found, expected, strict=True):
        other["usage"]["prompt_tokens_details"] = one["usage"]["prompt_tokens_details"]  # of another prefix cache
    assert found == expected
    assert not any(map(is_alive, first))
    assert server.await_health("ok") == {"status": "ok"}
    engine = server.engine()
    (shown,) = shown_by(engine.pid)
    assert shown.instance is not None
    assert server_of(shown.instance) is not None, "phalanx doctor finds the new engine, and its server"
    (status,) = server.client.get("/status.json").json()["instances"]
    assert status["pid"] == engine.pid and len(status["ranks"]) == 2
    metrics = server.client.get("/metrics").text
    assert 'phalanx_engine_restarts_total{engine="0"} 1.0' in metrics
    assert 'phalanx_requests_total{outcome="error"}' not in metrics


def test_a_signal_during_a_restart_ends_in_good_order(server: Server) -> None:
    server.await_health("ok")
    members = server.family()
    server.engine().kill()
    server.await_health("restarting")
    while not any("phalanx.engine.process" in child.cmdline() and child not in members for child in server.family()):
        time.sleep(0.01)
    members += server.family()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15.0) == 0
    expires_at = time.monotonic() + GONE_WITHIN_S
    while any(map(is_alive, members)) and time.monotonic() < expires_at:
        time.sleep(0.01)
    assert not any(map(is_alive, members))


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
