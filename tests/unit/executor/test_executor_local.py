"""The launcher when its fork server does not do what it should. No rank is ever forked here."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time

import pytest

import phalanx.executor.fork_server_process as fork_server_process
from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.errors import DeadlineError, StartError
from phalanx.executor.local import LocalLauncher
from phalanx.worker.spec import WorkerSpec


def spec(rank: int) -> WorkerSpec:
    return WorkerSpec(
        rank=rank,
        local_rank=rank,
        ranks_on_host=2,
        device="cpu",
        config=Config.build(model="m"),
        checkpoint="m",
        epoch=1,
        groups=(GroupSpec("tp", "shm", (0, 1), 1, 1.0, 1.0),),
        queue=None,
    )


def test_it_may_be_closed_as_soon_as_it_is_made() -> None:
    launcher = LocalLauncher({})
    launcher.close(0.0)
    assert launcher._server._process.returncode == -signal.SIGKILL


def test_a_fork_server_that_dies_before_it_forks_is_the_end_of_every_rank() -> None:
    launcher = LocalLauncher({})
    launcher.start([spec(0), spec(1)])
    launcher._server._process.kill()  # torch's import takes longer than this
    expires_at = time.monotonic() + 5
    while len(launcher.exits()) < 2:
        assert time.monotonic() < expires_at
        time.sleep(0.005)
    assert set(launcher.exits()) == {0, 1}
    assert all("fork server ended: killed by SIGKILL" in how for how in launcher.exits().values())
    launcher.close(0.0)


def test_how_a_rank_ends_is_told_before_it_has_ended_and_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LocalLauncher({})
    pid = launcher.reserve(0, timeout_s=30.0)
    assert not launcher.exits()
    codes = iter([-signal.SIGSEGV])
    monkeypatch.setattr(fork_server_process, "ending_of", lambda of, _: next(codes, None) if of == pid else None)
    assert launcher.exits() == {0: "killed by SIGSEGV"}
    assert launcher.exits() == {0: "killed by SIGSEGV"}, "though it is just gone, and nobody has said so yet"
    assert not launcher.await_exits(0.0)
    os.kill(launcher._server._process.pid, signal.SIGSTOP)
    os.kill(launcher._server._process.pid, signal.SIGKILL)
    assert launcher.await_exits(10.0)
    assert "fork server ended" in launcher.exits()[0]
    launcher.close(0.0)


def test_a_fork_server_that_cannot_be_killed_is_an_error_and_not_a_wait_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fork_server_process, "KILL_DEADLINE_S", 0.1)
    launcher = LocalLauncher({})
    os.kill(launcher._server._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as kernel:
        kernel.setattr(launcher._server._process, "kill", lambda: None)
        with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the end after SIGKILL from the fork server \(pid"):
            launcher.close(0.0)
    launcher.close(0.0)
    assert launcher._server._process.returncode == -signal.SIGKILL


def test_a_fork_server_that_cannot_be_started_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    gc.collect()  # what earlier tests have left to it
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StartError, match=r"the fork server did not start: .*/no/such/python"):
        LocalLauncher({})
    assert set(os.listdir("/proc/self/fd")) == before
