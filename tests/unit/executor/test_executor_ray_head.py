"""A run that has lost Ray's head: it ends with an error that says so, and its end waits for nobody."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray")

from ray_head import head

from phalanx.errors import ConfigError, DeadlineError
from phalanx.executor.ray import head as head_module
from phalanx.executor.ray import reservation
from phalanx.executor.ray.head import NUM_LOOKS, HeadWatch, WatchedChannel
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.ray.line_processes import LineProcesses
from phalanx.executor.ray.probe import is_gone
from phalanx.protocol.worker import Call, Ping, Stop, WorkerMessage

PATIENCE_S = 0.3
SOON_S = 5.0
TOLD = cast(WorkerMessage, "a reply")


class FakeChannel:
    """Gives what is in `script`, then nothing."""

    def __init__(self, *script: WorkerMessage) -> None:
        self.script = deque(script)
        self.sent: list[Call] = []

    def put(self, message: Call, *, deadline_s: float) -> None:
        self.sent.append(message)

    def get(self, *, timeout_s: float | None) -> tuple[int, WorkerMessage, Sequence[memoryview]] | None:
        if self.script:
            return 0, self.script.popleft(), ()
        time.sleep(timeout_s or 0.0)
        return None

    def forget(self, reader: int) -> None: ...

    def close(self) -> None: ...


def await_failure(watch: HeadWatch) -> DeadlineError:
    expires_at = time.monotonic() + SOON_S
    while watch.failure is None:
        assert time.monotonic() < expires_at
        time.sleep(0.01)
    return watch.failure


def test_a_head_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHECK_S", 0.02)
    inner = FakeChannel(TOLD)
    with head("a token") as address:
        watch = HeadWatch(address, PATIENCE_S)
        channel = WatchedChannel(inner, watch)
        time.sleep(PATIENCE_S * 2)
        channel.put(Call(1, Ping(), (0,)), deadline_s=1.0)
        assert channel.get(timeout_s=SOON_S) == (0, TOLD, ())
        assert channel.get(timeout_s=0.05) is None
    with watch:
        with pytest.raises(DeadlineError, match=rf"0\.3 s for a sign of life from Ray's head at {address}"):
            channel.get(timeout_s=SOON_S)
        inner.script.append(TOLD)
        assert channel.get(timeout_s=0.0) == (0, TOLD, ())
        with pytest.raises(DeadlineError):
            channel.put(Call(2, Stop(), ()), deadline_s=1.0)
        assert isinstance(inner.sent[-1].body, Stop), "ranks are to leave all the same"


def test_a_head_that_comes_back_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = deque([True] * (NUM_LOOKS - 1) + [False] + [True] * NUM_LOOKS)
    monkeypatch.setattr(head_module, "is_gone", lambda address: seen.popleft())
    with HeadWatch("10.0.0.1:6379", 0.06) as watch:
        await_failure(watch)
    assert not seen


def test_rays_own_patience_is_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(head_module, "ray", fake)
    monkeypatch.setattr(head_module, "is_gone", lambda address: True)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with HeadWatch.of_connection() as watch:
        assert await_failure(watch).waited_s == 0.5


@pytest.mark.parametrize("told", ["a minute", "1.5", "", "0", "-1"])
def test_a_patience_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    fake = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(head_module, "ray", fake)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", told)
    with pytest.raises(ConfigError, match=f"RAY_gcs_rpc_server_reconnect_timeout_s: '{told}' .* whole number"):
        HeadWatch.of_connection()


def test_a_placement_group_is_removed_only_while_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Any] = []
    monkeypatch.setattr(reservation, "remove_placement_group", removed.append)
    with head("a token") as address:
        context = SimpleNamespace(gcs_address=address)
        fake = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
        monkeypatch.setattr(reservation, "ray", fake)
        reservation._remove(["first"])  # type: ignore[list-item]
    reservation._remove(["second"])  # type: ignore[list-item]
    assert removed == ["first"]


def test_ranks_that_ray_does_not_end_are_ended() -> None:
    """Ray's way of killing an actor leads over its head."""
    with subprocess.Popen(["sleep", "60"]) as rank:
        placed = SimpleNamespace(rank=0, pid=rank.pid, is_driver_node=True, node_id="a")
        launcher = RayLauncher(
            cast(
                LineProcesses,
                SimpleNamespace(placed=(placed,), raylet=None, kill=lambda: None, end_remote=lambda: None),
            )
        )
        launcher.close(0.0)
        assert rank.poll() == -9


def test_a_head_whose_host_does_not_answer_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a cut cable: connections are neither taken nor refused."""
    monkeypatch.setattr("phalanx.executor.ray.probe.LOOK_S", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # more than the system keeps for who does not take them
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        assert is_gone(address)
        for one in waiting:
            one.close()


def test_a_head_that_takes_connections_and_says_nothing_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not is_gone(f"127.0.0.1:{listener.getsockname()[1]}")
