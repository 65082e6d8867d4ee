"""`phalanx scale` and `phalanx drain` against a server that says what a test tells it to say."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from phalanx.cli.main import run
from phalanx.cli.running_server import RunningServer
from phalanx.errors import ConfigError


class Server(ThreadingHTTPServer):
    """Answers each call with the next of `answers`, and the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[tuple[str, str, Any]] = []
        self.keys: set[str | None] = set()
        self.on_asked: Callable[[tuple[str, str, Any]], None] = lambda asked: None
        self.may_answer = threading.Event()
        self.has_asked = threading.Event()
        """How it is: what began it was answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, json.loads(content) if content else None))
        self.server.on_asked(self.server.asked[-1])
        if self.server.may_answer.is_set():  # whoever asked has gone
            return
        self.server.keys.add(self.headers.get("Authorization"))
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if self.command == "GET":
            self.server.has_asked.set()

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def report(state: str, *replicas: tuple[int, str], **resize: Any) -> tuple[int, Any]:
    shape = {"tensor_parallel_size_before": 1, "tensor_parallel_size": 1}
    told = {"id": 7, "size_before": 1, "data_parallel_size": 2, **shape, "state": state, "took_s": 4.25, **resize}
    listed = [{"replica": number, "state": one, "num_requests": 2} for number, one in replicas]
    return 200, {"data_parallel_size": 1, "replicas": listed, "strength": {"wanted": 1}, "resize": told}


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def test_it_waits_for_the_end(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_API_KEY", "secret")
    server.answers = [
        report("running", (0, "serving"), (1, "joining")),
        report("running", (0, "serving"), (1, "joining")),
        report("done", (0, "serving"), (1, "serving")),
    ]
    assert run(["scale", server.url + "/v1/", "2", "--drain-timeout", "3"]) == 0
    assert server.asked[0] == ("POST", "/scale", {"data_parallel_size": 2, "leaving": [], "drain_timeout_s": 3.0})
    assert [asked[:2] for asked in server.asked[1:]] == [("GET", "/scale")] * 2
    assert server.keys == {"Bearer secret"}
    said = capsys.readouterr()
    assert said.out == "replicas: 2, before: 1; it took 4.2 s\n"
    assert said.err == "replica 0: serving\nreplica 1: joining\nreplica 1: serving\n"


def test_the_tensor_parallel_size(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"size_before": 2, "data_parallel_size": 2, "tensor_parallel_size_before": 1, "tensor_parallel_size": 2}
    server.answers = [report("done", (0, "serving"), (1, "serving"), **sizes)]
    assert run(["scale", server.url, "-tp", "2"]) == 0
    asked = {"tensor_parallel_size": 2, "leaving": [], "drain_timeout_s": 30.0}
    assert server.asked[0] == ("POST", "/scale", asked)
    assert capsys.readouterr().out == "replicas: 2, before: 2; TP size: 2, before: 1; it took 4.2 s\n"


def test_a_replica_is_drained_and_gone(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [report("running", (0, "serving"), (1, "leaving")), report("done", (0, "serving"))]
    assert run(["drain", server.url, "1"]) == 0
    assert server.asked[0] == ("POST", "/drain", {"replica": 1, "drain_timeout_s": 30.0})
    assert capsys.readouterr().err == "replica 0: serving\nreplica 1: leaving\nreplica 1: gone\n"


def test_a_node_is_drained_and_what_is_missing_is_said(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [report("done", (0, "serving"), node="beta", size_before=2, data_parallel_size=1)]
    because = "node beta is drained"
    strength = {"wanted": 2, "num_missing": 1, "missing_because": because, "drained_nodes": ["beta"]}
    server.answers[0][1]["strength"] = strength
    assert run(["drain", server.url, "beta", "--drain-timeout", "0"]) == 0
    assert server.asked[0] == ("POST", "/drain", {"node": "beta", "drain_timeout_s": 0.0})
    assert capsys.readouterr().out == (
        "replicas: 1, before: 2; it took 4.2 s\n"
        "missing: 1 of 2 replicas, until they are asked for again (phalanx scale): node beta is drained\n"
        "drained: beta\n"
    )
    strength |= {"grows": True, "drained_nodes": []}
    assert run(["drain", server.url, "beta", "--undo"]) == 0
    assert server.asked[-1] == ("POST", "/drain", {"node": "beta", "undo": True, "drain_timeout_s": 30.0})
    assert capsys.readouterr().out == "missing: 1 of 2 replicas, until there is room again: node beta is drained\n"
    assert run(["drain", server.url, "1", "--undo"]) == 2
    assert "--undo is for a node" in capsys.readouterr().err


def test_without_a_size_it_lists_the_replicas(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [report("done", (0, "serving"), (3, "dead"))]
    assert run(["scale", server.url]) == 0
    assert capsys.readouterr().out == "replica 0: serving, requests: 2\nreplica 3: dead, requests: 2\n"
    for flags in (["--leaving", "3"], ["--drain-timeout", "3"], ["--no-wait"]):
        assert run(["scale", server.url, *flags]) == 2
        said = capsys.readouterr().err
        assert "give SIZE" in said and flags[0].replace("--no-", "--") in said
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answers", "code", "word"),
    [
        ([report("running"), report("failed", error="replica 1 did not start")], 1, "replica 1 did not start"),
        ([report("running"), report("cancelled")], 1, "was cancelled"),
        ([report("running"), report("running", id=8)], 2, "started anew, or somebody else"),
        ([error(409, "a resize is under way")], 2, "a resize is under way"),
        ([error(503, "the engine has stopped")], 1, "the engine has stopped"),
        ([(200, {"other": 1})], 2, "is no Phalanx server"),
        ([(404, "what?")], 2, "no Phalanx server"),
    ],
)
def test_what_goes_wrong_is_said(
    server: Server, capsys: pytest.CaptureFixture[str], answers: list[Any], code: int, word: str
) -> None:
    server.answers = answers
    assert run(["scale", server.url, "2"]) == code
    assert word in capsys.readouterr().err


def test_no_wait_returns_at_once(server: Server) -> None:
    server.answers = [report("running")]
    assert run(["scale", server.url, "2", "--no-wait"]) == 0
    assert len(server.asked) == 1


def test_interrupted_it_undoes_the_resize(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [report("running")]

    def interrupt() -> None:
        server.has_asked.wait(10)
        server.answers = [report("running"), report("running"), report("cancelled")]
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run(["scale", server.url, "2"]) == 130
    thread.join()
    assert ("DELETE", "/scale", None) in server.asked
    assert "the resize: cancelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "took_s", "said"),
    [
        ("running", 0.0, "the resize: cancelled"),
        ("running", 1e6, "it has not begun"),  # that is somebody else's
        ("done", 0.0, "it has not begun"),
    ],
)
def test_interrupted_before_the_answer_it_says_what_becomes_of_the_resize(
    server: Server, capsys: pytest.CaptureFixture[str], state: str, took_s: float, said: str
) -> None:
    def interrupt(asked: tuple[str, str, Any]) -> None:
        if asked[0] == "POST":
            os.kill(os.getpid(), signal.SIGINT)
            server.may_answer.wait(10)

    server.on_asked = interrupt
    server.answers = [report(state, took_s=took_s), report("cancelled"), report("cancelled")]
    assert run(["scale", server.url, "2"]) == 130
    server.may_answer.set()
    assert said in capsys.readouterr().err
    assert (("DELETE", "/scale", None) in server.asked) == (said == "the resize: cancelled")


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with Server() as gone:
        url = gone.url
    assert run(["scale", url, "2"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="such as http://127"):
        RunningServer("ftp://x")
    assert RunningServer("host:80").url == "http://host:80"
