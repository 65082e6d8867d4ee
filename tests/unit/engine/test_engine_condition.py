"""How the engine's process is, told without its help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from phalanx.engine import condition
from phalanx.engine.condition import Condition, ProcessWatch


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield child
    finally:
        child.kill()
        child.wait(10)


def test_a_stopped_process(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition, "STOPPED_AFTER_S", 0.05)
    watch = ProcessWatch(sleeper.pid, 60.0)
    watch.look(0.0)
    assert watch.trouble() is None
    for times in (1, 2):
        os.kill(sleeper.pid, signal.SIGSTOP)
        expires_at = time.monotonic() + 10.0
        while watch.trouble() is None and time.monotonic() < expires_at:
            watch.look(0.0)
            time.sleep(0.01)
        found = watch.trouble()
        assert found is not None and (found.cause, found.culprits) == ("stopped", ())
        assert found.paragraph == f"the engine's process (pid {sleeper.pid}) is stopped by a signal"
        watch.look(0.0)
        assert watch.counts == {"stopped": times}
        os.kill(sleeper.pid, signal.SIGCONT)
        while watch.trouble() is not None and time.monotonic() < expires_at:
            watch.look(0.0)
            time.sleep(0.01)
        assert watch.trouble() is None


@pytest.mark.parametrize(("in_order_s", "limit_s"), [(1.0, 10.0), (60.0, 30.0)])
def test_a_silent_process(in_order_s: float, limit_s: float) -> None:
    watch = ProcessWatch(os.getpid(), in_order_s)
    watch.look(limit_s - 0.1)
    assert watch.trouble() is None
    watch.look(limit_s)
    found = watch.trouble()
    assert found is not None and found.cause == "silent" and found.for_s == limit_s
    watch.look(0.0)
    assert watch.trouble() is None and watch.counts == {"silent": 1}


def test_a_process_that_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    watch = ProcessWatch(sleeper.pid, 60.0)
    sleeper.kill()
    sleeper.wait(10)
    for one in (watch, ProcessWatch(sleeper.pid, 60.0)):
        one.look(0.0)
        assert one.trouble() is None  # the end of its stream tells


def test_health() -> None:
    assert Condition(pid=1).is_healthy and not Condition(pid=1, dead="why").is_healthy
