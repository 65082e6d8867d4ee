"""The server as a process: start, stop, a second stop, and the death of its engine."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from phalanx.config import Config, ServerConfig
from phalanx.engine.client import EngineClient
from phalanx.errors import CheckpointError
from phalanx.server.run import OnProgress, run_server

TIMEOUT_S = 30.0
PROMPT = {"prompt": "x"}

pytestmark = pytest.mark.slow


class ServerProcess:
    """`tests/unit/server/server_process.py`, ended at the latest when the test does."""

    def __init__(self, model: str, port: int = 0, shutdown_timeout_s: float = 20.0) -> None:
        here = Path(__file__).parent
        self.process = subprocess.Popen(
            [sys.executable, str(here / "server_process.py"), model, str(port), str(shutdown_timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
        )

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Exit code and stderr, once it has ended."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors


@contextmanager
def running(model: str, port: int = 0, shutdown_timeout_s: float = 20.0) -> Iterator[ServerProcess]:
    server = ServerProcess(model, port, shutdown_timeout_s)
    killer = threading.Timer(TIMEOUT_S, server.process.kill)
    killer.start()
    try:
        yield server
    finally:
        killer.cancel()
        server.process.kill()
        server.process.communicate()


class Answer(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, ask: Callable[[], httpx.Response]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self._answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self._answer = self._ask()

    def get(self) -> httpx.Response:
        self.join(TIMEOUT_S)
        assert self._answer is not None
        return self._answer


def ask(url: str, **body: object) -> Answer:
    return Answer(lambda: httpx.post(f"{url}/v1/completions", json={**PROMPT, **body}, timeout=TIMEOUT_S))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_idle_server(number: signal.Signals) -> None:
    with running("plain") as server:
        url = server.read_line()
        assert httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=TIMEOUT_S).status_code == 200
        server.process.send_signal(number)
        assert server.end() == (0, "")


def test_running_requests_finish_before_the_end() -> None:
    with running("waiting") as server:
        url = server.read_line()
        answer = ask(url)
        assert server.read_line() == "running"
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200:
            pass
        assert ask(url).get().json()["error"]["code"] == "shutting_down"
        assert server.process.stdin is not None
        server.process.stdin.write("\n")
        server.process.stdin.flush()
        assert answer.get().json()["choices"][0]["text"] == "Hello"
        assert server.end()[0] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_in_time_gets_an_error(stream: bool) -> None:
    with running("pausing", shutdown_timeout_s=0.05) as server:
        answer = ask(server.read_line(), stream=stream)
        assert server.read_line() == "running"
        server.process.send_signal(signal.SIGTERM)
        assert "shut down before" in answer.get().text
        code, errors = server.end()
        assert code == 0
        assert "did not finish in time and are cancelled: 1" in errors


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_waits_for_an_engine_that_is_asleep(stream: bool) -> None:
    with running("asleep", shutdown_timeout_s=3600.0) as server:
        url = server.read_line()
        answer = ask(url, stream=stream)
        assert server.read_line() == "running"
        server.process.send_signal(signal.SIGTERM)
        assert "shut down before" in answer.get().text
        code, errors = server.end()
        assert code == 0 and "requests that wait for an engine that is asleep and are cancelled: 1" in errors


def test_a_second_signal_does_not_wait() -> None:
    with running("pausing", shutdown_timeout_s=3600.0) as server:
        url = server.read_line()
        answer = ask(url)
        assert server.read_line() == "running"
        server.process.send_signal(signal.SIGINT)
        while httpx.get(f"{url}/health", timeout=TIMEOUT_S).status_code == 200:
            pass
        server.process.send_signal(signal.SIGINT)
        assert "shut down before" in answer.get().text
        assert server.end()[0] == 0


def test_without_descriptors_clients_wait_and_the_log_stays_short() -> None:
    with running("plain") as server, ExitStack() as clients:
        url = server.read_line()
        pid, port = server.process.pid, int(url.rpartition(":")[2])
        _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), most))
        for _ in range(20):
            clients.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        time.sleep(1.5)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
        assert httpx.post(f"{url}/v1/completions", json=PROMPT, timeout=TIMEOUT_S).status_code == 200
        clients.close()
        server.process.send_signal(signal.SIGTERM)
        code, errors = server.end()
        assert code == 0 and 1 <= errors.count("out of system resource") <= 6, errors


def test_the_death_of_the_engine_is_answered_and_ends_the_server() -> None:
    with running("dying") as server:
        answer = ask(server.read_line()).get()
        assert answer.status_code == 503
        assert "rank 3 was killed" in answer.json()["error"]["message"]
        code, errors = server.end()
        assert code == 1
        assert errors.count("rank 3 was killed") == 1


def test_while_the_model_loads_the_port_answers_that_it_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running("endless", port) as server:
        url = server.read_line()
        response = httpx.get(f"{url}/health", timeout=TIMEOUT_S)
        assert response.status_code == 503
        assert "loading weights" in response.json()["error"]["message"]
        server.process.send_signal(signal.SIGINT)
        assert server.end() == (0, "")


def test_a_client_that_closes_its_connection_is_noticed() -> None:
    with running("pausing") as server:
        url = server.read_line()
        with (
            httpx.Client(timeout=TIMEOUT_S) as client,
            client.stream("POST", f"{url}/v1/completions", json={**PROMPT, "stream": True}) as response,
        ):
            assert next(response.iter_lines()).startswith("data: ")
        while 'phalanx_requests_total{outcome="cancelled"} 1.0' not in httpx.get(f"{url}/metrics", timeout=5).text:
            assert server.process.poll() is None


async def refuse(config: Config, on_progress: OnProgress) -> EngineClient:
    raise CheckpointError(f"{config.model.model}: there is no such file or directory")


def serve_nothing(host: str) -> None:
    """Start a server whose engine does not start."""
    server = ServerConfig(host=host, port=0)
    config = Config.build(model="m")
    run_server(config, server, on_progress=lambda _: None, on_ready=lambda _: None, start_engine=refuse)


def test_an_engine_that_does_not_start_is_the_callers_error() -> None:
    with pytest.raises(CheckpointError):
        serve_nothing("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "key", "warns"), [("0.0.0.0", "", True), ("0.0.0.0", "k", False), ("127.0.0.1", "", False)]
)
def test_an_open_door_is_warned_of(
    host: str, key: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PHALANX_API_KEY", key)
    with pytest.raises(CheckpointError):
        serve_nothing(host)
    assert ("everybody who can reach" in caplog.text) == warns
