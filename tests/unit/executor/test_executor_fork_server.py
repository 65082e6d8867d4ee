"""The fork server before its first fork, in this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from phalanx.executor.fork_server import ForkServer, Warm, send


def serve(order: Warm) -> None:
    """One order, and the end."""
    orders_read, orders_write = os.pipe()
    events_read, events_write = os.pipe()
    send(orders_write, order)
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
