"""A served model whose rank is stopped says so wherever people look, and says that it is well again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from phalanx.ledger.events import Event
from phalanx.ledger.instance import shown_by
from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

DEADLINE_S = 60.0
T = TypeVar("T")


def until(condition: Callable[[], T | None], awaited: str) -> T:
    expires_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < expires_at:
        with contextlib.suppress(httpx.TransportError):
            if (found := condition()) is not None:
                return found
        time.sleep(0.05)
    raise AssertionError(f"waited {DEADLINE_S} s for {awaited}")


class Served:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.events = folder / "events.jsonl"
        self.log = folder / "log"
        command = [sys.executable, "-m", "phalanx", "serve", str(write_checkpoint(folder / "llama"))]
        command += ["--port", str(port), "-tp", "2", "--ledger-events", str(self.events), "--device", "cpu"]
        command += ["--max-num-seqs", "4", "--kv-cache-memory", "16MiB", "--step-timeout-s", "200", "--no-heal"]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(command, stdout=sink, stderr=sink)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def health(self) -> httpx.Response:
        response = self.client.get("/health", timeout=5.0)
        assert self.process.poll() is None, self.log.read_text()
        return response

    def await_health(self, status: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            response = self.health()
            assert response.status_code == (200 if response.json()["status"] == "ok" else 503)
            return response.json() if response.json()["status"] == status else None

        return until(found, f"health: {status}; the log: {self.log.read_text()}")

    def doctor(self, *flags: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "phalanx", "doctor", "--json", *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
        found = json.loads(ended.stdout)
        assert ended.returncode == any(check["status"] == "fail" for check in found), ended.stderr
        return found

    def stop_for_good(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.client.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"))
    try:
        served.await_health("ok")
        yield served
    finally:
        served.stop_for_good()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_stopped_rank(served: Served) -> None:
    (instance,) = served.client.get("/status.json").json()["instances"]
    engine, culprit = instance["pid"], instance["ranks"][1]
    assert {rank["phase"] for rank in instance["ranks"]} <= {"idle", "stepping"}
    asked = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
    served.client.post("/v1/completions", json=asked)  # so that it is known how long a step takes
    with ThreadPoolExecutor(1) as thread:
        with stopped(culprit["pid"]):
            answer = thread.submit(served.client.post, "/v1/completions", json=asked, timeout=DEADLINE_S)
            body = served.await_health("stuck")
            (check,) = served.doctor("--pid", str(served.process.pid), "--stacks")
            metrics = served.client.get("/metrics").text
            page = served.client.get("/status").text
        served.await_health("ok")
        assert answer.result().json()["usage"]["completion_tokens"] == 20  # the step goes on
    for verdict in (body["verdict"], check["facts"]["verdict"]):
        assert (verdict["cause"], verdict["culprits"]) == ("stopped", [1])
        assert verdict["paragraph"].startswith(f"rank 1 on {culprit['node']} is stopped by a signal")
        assert verdict["for_s"] > 0.0 and verdict["since"].endswith("Z")
    assert check["facts"]["pid"] == engine and check["facts"]["server"]["url"] == str(served.client.base_url)
    first, second = check["facts"]["ranks"]
    assert (first["process"], first["waits_for"], second["process"]) == ("running", [1], "stopped")
    assert any(group["is_in"] and group["mark"] == "waits" for group in first["groups"])
    assert first["stack"] and not second["stack"] and check["facts"]["stack"]
    assert 'phalanx_ledger_verdicts_total{cause="stopped"} 1.0' in metrics
    assert 'phalanx_engine_healthy{engine="0"} 0.0' in metrics
    assert 'phalanx_ledger_ranks_watched{engine="0"} 2.0' in metrics
    assert "rank 1 on" in page and 'class="culprit"' in page
    told = [json.loads(line) for line in served.events.read_text().splitlines()]
    assert [event["event"] for event in told] == ["verdict", "verdict_over"]
    assert set(told[0]) == {*Event.__struct_fields__} - {"command_pid"} and told[0]["engine_pid"] == engine
    assert told[0]["verdict"]["culprits"] == [1] and told[0]["verdict"]["stacks"]


def test_a_stopped_engine(served: Served) -> None:
    (instance,) = served.client.get("/status.json").json()["instances"]
    engine = instance["pid"]
    with stopped(engine):
        body = served.await_health("stuck")
        (check,) = served.doctor("--pid", str(engine))
    assert body["verdict"]["cause"] == "stopped" and not body["verdict"]["culprits"]
    assert f"the engine's process (pid {engine}) is stopped" in body["error"]["message"]
    assert check["status"] == "fail" and check["facts"]["process"] == "stopped"
    assert [rank["process"] for rank in check["facts"]["ranks"]] == ["running", "running"]
    served.await_health("ok")


def test_what_is_gone_is_not_found(served: Served) -> None:
    (instance,) = served.client.get("/status.json").json()["instances"]
    assert shown_by(instance["pid"])
    served.stop_for_good()
    until(lambda: None if shown_by(instance["pid"]) else True, "the instance's end")
