"""The fork server before its first fork, in this process."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

from phalanx.errors import StartError
from phalanx.executor import fork_server_process
from phalanx.executor.fork_server import ForkServer, Warm, frame
from phalanx.executor.fork_server_process import ForkServerProcess
from phalanx.executor.local import LocalLaunchers


def serve(order: Warm) -> None:
    """One order, and the end."""
    orders_read, orders_write = os.pipe()
    events_read, events_write = os.pipe()
    os.write(orders_write, frame(order))
    os.close(orders_write)
    ForkServer(orders_read, events_write).serve()
    for descriptor in (orders_read, events_read, events_write):
        os.close(descriptor)


def test_ranks_find_the_modules_that_who_starts_them_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a worker extension beside the script; and the same of two that have one name."""
    folders = [tmp_path / name for name in ("of the script", "of the server")]
    for folder in folders:
        folder.mkdir()
        (folder / "phalanx_twice.py").touch()
    (folders[0] / "phalanx_beside.py").touch()
    (folders[1] / "phalanx_own.py").touch()
    usual = list(sys.path)
    monkeypatch.setattr(sys, "path", [str(folders[0]), "name\udcff", *usual])
    order = Warm("no such checkpoint")
    monkeypatch.setattr(sys, "path", [*usual, str(folders[1])])
    serve(order)
    for name, folder in (("beside", folders[0]), ("twice", folders[0]), ("own", folders[1])):
        found = importlib.util.find_spec(f"phalanx_{name}")
        assert found is not None and found.origin == str(folder / f"phalanx_{name}.py")


def test_one_that_takes_no_orders_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pipe keeps nobody waiting for ever: it has a stopped process at its other end."""
    monkeypatch.setattr(fork_server_process, "IMPORT_S", 0.2)
    server = ForkServerProcess({})
    try:
        os.kill(server._process.pid, signal.SIGSTOP)
        with pytest.raises(StartError, match=r"took no order for 0\.2 s"):
            for _ in range(64):
                server.warm("x" * 4096)
    finally:
        server.close(0.0)
    assert server.ended is not None and server.ended.startswith("killed by SIGKILL")


def test_one_that_does_not_answer_is_not_replaced_while_it_has_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To prepare a line must not end the one that computes."""

    class Silent:
        has_ranks = True
        is_closed = False

        def answers(self, timeout_s: float) -> bool:
            return False

        def close(self, timeout_s: float) -> None:
            self.is_closed = True

    server = Silent()
    launchers = LocalLaunchers()
    monkeypatch.setattr(launchers, "_server", server)
    with pytest.raises(StartError, match="has not answered"):
        launchers.launcher({})
    assert not server.is_closed
