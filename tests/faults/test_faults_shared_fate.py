"""No process outlives the one that it works for: whichever is killed, all are gone within two seconds."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from shared_memory_names import new_names

from phalanx.testing.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

GONE_WITHIN_S = 2.0
READY_WITHIN_S = 120.0
LAYERS = ("server", "engine", "fork server", "rank")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


class Family:
    """`phalanx serve` with two ranks, and every process of it."""

    def __init__(self, checkpoint: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._log = log
        command = [sys.executable, "-m", "phalanx", "serve", str(checkpoint), "--port", str(self.port)]
        command += ["--tensor-parallel-size", "2", "--max-num-seqs", "8", "--kv-cache-memory", "1MiB"]
        command += ["--engine-restarts", "0", "--no-heal"]
        with log.open("wb") as sink:
            self.server = subprocess.Popen(command, stdout=sink, stderr=sink)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def await_ready(self) -> None:
        expires_at = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < expires_at:
            assert self.server.poll() is None, self._log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=1.0).status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"not ready: {self._log.read_text()}")

    def layers(self) -> dict[str, list[psutil.Process]]:
        """Processes by depth: each is started by the one before."""
        found: dict[str, list[psutil.Process]] = {"server": [psutil.Process(self.server.pid)]}
        for above, layer in itertools.pairwise(LAYERS):
            children = [child for process in found[above] for child in process.children()]
            found[layer] = [child for child in children if not is_watcher(child)]
        return found

    def watchers(self) -> list[psutil.Process]:
        """Of the ledger."""
        return [child for engine in self.layers()["engine"] for child in engine.children() if is_watcher(child)]


@pytest.fixture
def family(checkpoint: Path, tmp_path: Path) -> Iterator[Family]:
    before = set(os.listdir("/dev/shm"))
    family = Family(checkpoint, tmp_path / "log")
    root = psutil.Process(family.server.pid)
    members: list[psutil.Process] = []
    try:
        yield family
        members = [root]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            members = [root, *root.children(recursive=True)]
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        family.server.wait(10)
    assert not new_names(before)


def is_watcher(process: psutil.Process) -> bool:
    return "phalanx.executor.watcher_process" in process.cmdline()


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def expect_gone(family: Family, members: list[psutil.Process], killed_at: float) -> None:
    while time.monotonic() < killed_at + GONE_WITHIN_S:
        family.server.poll()  # reaps the server itself, whose parent is this test
        if not alive(members) and not is_listening(family.port):
            return
        time.sleep(0.01)
    assert not alive(members), f"still there after {GONE_WITHIN_S} s"
    assert not is_listening(family.port), f"still listening after {GONE_WITHIN_S} s"


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != errno.ECONNREFUSED


@pytest.mark.parametrize("victim", LAYERS)
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_sigkill_of_any_process_leaves_nothing(family: Family, victim: str, is_busy: bool, tmp_path: Path) -> None:
    family.await_ready()
    layers = family.layers()
    assert [len(layers[layer]) for layer in LAYERS] == [1, 1, 1, 2]
    watchers = family.watchers()
    assert len(watchers) == 1
    members = [process for layer in LAYERS for process in layers[layer]] + watchers
    with contextlib.ExitStack() as stack:
        if is_busy:
            body = {"model": "nobody", "prompt": "hello", "max_tokens": 400, "stream": True, "ignore_eos": True}
            body["model"] = httpx.get(f"{family.url}/v1/models").json()["data"][0]["id"]
            stream = httpx.stream("POST", f"{family.url}/v1/completions", json=body, timeout=10)
            lines = stack.enter_context(stream).iter_lines()
            for _ in range(random.randint(1, 20)):
                next(lines)
        place = random.randrange(len(layers[victim]))
        process = layers[victim][place]
        process.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        expect_gone(family, members, killed_at)
    if victim == "rank" and not is_busy:
        assert family.server.wait(10) == 1
        log = (tmp_path / "log").read_text()
        assert f"rank {place} (pid {process.pid}) died: killed by SIGKILL" in log


def test_a_start_that_is_killed_leaves_nothing(family: Family) -> None:
    time.sleep(random.uniform(0.2, 3.0))  # any moment of the start will do
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(family.server.pid)
        members = [root, *root.children(recursive=True)]
        root.kill()
        expect_gone(family, members, time.monotonic())


def test_ctrl_c_ends_in_good_order(family: Family) -> None:
    family.await_ready()
    members = [process for processes in family.layers().values() for process in processes]
    family.server.send_signal(signal.SIGINT)
    assert family.server.wait(15) == 0
    expect_gone(family, members, time.monotonic())
