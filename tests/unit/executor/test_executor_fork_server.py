"""The fork server before its first fork, in this process."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import msgspec
import pytest

from phalanx.config import Config
from phalanx.errors import StartError
from phalanx.executor import fork_server_process
from phalanx.executor.fork_server import (
    HEADER_BYTES,
    Answered,
    Ask,
    Employ,
    Event,
    Exited,
    Fork,
    Forked,
    ForkServer,
    Order,
    Reserve,
    Warm,
    frame,
    split_frames,
)
from phalanx.executor.fork_server_process import ForkServerProcess
from phalanx.executor.local import LocalLaunchers
from phalanx.executor.platform import thread_environment
from phalanx.models import attention, model
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.liveness import start_time_of
from phalanx.worker.spec import WorkerSpec


def serve(*orders: Order) -> list[Event]:
    """These orders, and the end. What is said meanwhile."""
    orders_read, orders_write = os.pipe()
    events_read, events_write = os.pipe()
    os.write(orders_write, b"".join(map(frame, orders)))
    os.close(orders_write)
    ForkServer(orders_read, events_write).serve()
    os.close(orders_read)
    os.close(events_write)
    with open(events_read, "rb") as events:
        return [msgspec.msgpack.decode(one, type=Event) for one in split_frames(bytearray(events.read()))]


def fork_order(line: int) -> Fork:
    config = Config.build(model="m")
    spec = WorkerSpec(
        rank=0,
        local_rank=0,
        ranks_on_host=1,
        device="cpu",
        config=config,
        checkpoint="no such checkpoint",
        epoch=1,
        groups=(),
        queue=None,
    )
    return Fork(line, spec)


@pytest.mark.parametrize("failing", ["fork", "pidfd_open"])
def test_a_worker_that_cannot_be_forked_ends_no_other_line(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """And leaves no process behind."""
    forked: list[int] = []
    fork, call = os.fork, getattr(os, failing)

    def counting_fork() -> int:
        forked.append(fork())
        return forked[-1]

    def fail_the_second_time(*arguments: int) -> int:
        if forked and (failing == "fork" or len(forked) == 2):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return counting_fork() if failing == "fork" else int(call(*arguments))

    monkeypatch.setattr(ForkServer, "_become_worker", lambda *_: os._exit(int(signal.pause() is None)))
    monkeypatch.setattr(os, "fork", counting_fork)
    monkeypatch.setattr(os, failing, fail_the_second_time)
    first, second, answer = serve(fork_order(1), fork_order(2), Ask(3))
    assert isinstance(first, Forked) and (first.line, first.pid) == (1, forked[0])
    assert second == Exited(2, 0, "could not be forked: Too many open files")
    assert answer == Answered(3), "and nothing was told of the first line"
    for pid in forked:
        assert not Path(f"/proc/{pid}").exists()


def test_a_reserved_process_becomes_a_worker_when_it_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = msgspec.structs.replace(fork_order(1).spec, checkpoint="long" * 100_000)  # more than a pipe takes
    run = SimpleNamespace(run=lambda told: 40 + (told == spec))
    monkeypatch.setitem(sys.modules, "phalanx.worker.process", cast(ModuleType, run))
    orders_read, orders_write = os.pipe()
    events_read, events_write = os.pipe()
    seen: list[Event] = []

    def give_orders() -> None:
        pending = bytearray()
        with open(orders_write, "wb") as orders:
            orders.write(frame(Reserve(1, 0)) + frame(Reserve(2, 0)))
            orders.flush()
            while len(seen) < 2:
                pending += os.read(events_read, 1 << 16)
                seen.extend(msgspec.msgpack.decode(one, type=Event) for one in split_frames(pending))
            orders.write(frame(Employ(1, spec)))
            orders.flush()
            seen.append(msgspec.msgpack.decode(os.read(events_read, 1 << 16)[HEADER_BYTES:], type=Event))
            assert isinstance(seen[1], Forked)
            os.kill(seen[1].pid, signal.SIGKILL)  # it has the end of the orders, too, as its server is in this process

    giver = threading.Thread(target=give_orders)
    giver.start()
    ForkServer(orders_read, events_write).serve()
    giver.join()
    for descriptor in (orders_read, events_write, events_read):
        os.close(descriptor)
    first, second, exited = seen
    assert isinstance(first, Forked) and isinstance(second, Forked) and (first.line, second.line) == (1, 2)
    assert exited == Exited(1, 0, "exit code 41"), "and the other one has waited for its own order"


def test_code_that_cannot_be_imported_is_for_the_workers_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(checkpoint: str) -> None:
        raise ImportError(checkpoint)

    monkeypatch.setattr(model, "import_definition", fail)
    monkeypatch.setattr(attention, "import_backend", fail)
    assert serve(Warm("a checkpoint", "cpu"), Ask(1)) == [Answered(1)]


def test_what_is_imported_is_for_the_model_and_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(model, "import_definition", imported.append)
    monkeypatch.setattr(attention, "import_backend", imported.append)
    serve(Warm("a checkpoint", "cuda"))
    assert imported == ["cuda", "a checkpoint"]


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
    order = Warm("no such checkpoint", "cpu")
    monkeypatch.setattr(sys, "path", [*usual, str(folders[1])])
    serve(order)
    for name, folder in (("beside", folders[0]), ("twice", folders[0]), ("own", folders[1])):
        found = importlib.util.find_spec(f"phalanx_{name}")
        assert found is not None and found.origin == str(folder / f"phalanx_{name}.py")


def test_it_has_one_thread_after_its_imports(tmp_path: Path) -> None:
    """Of others a fork would leave the locks."""
    server = ForkServerProcess(thread_environment(4))
    try:
        server.warm(str(write_checkpoint(tmp_path)), "cpu")
        assert server.answers(60.0)
        assert len(os.listdir(f"/proc/{server._process.pid}/task")) == 1
    finally:
        server.close(0.0)


def test_one_that_takes_no_orders_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full pipe keeps nobody waiting for ever: it has a stopped process at its other end."""
    monkeypatch.setattr(fork_server_process, "IMPORT_S", 0.2)
    server = ForkServerProcess({})
    try:
        os.kill(server._process.pid, signal.SIGSTOP)
        with pytest.raises(StartError, match=r"took no order for 0\.2 s"):
            for _ in range(64):
                server.warm("x" * 4096, "cpu")
    finally:
        server.close(0.0)
    assert server.ended is not None and server.ended.startswith("killed by SIGKILL")


def test_a_process_that_has_the_pid_of_a_rank_by_then_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
    with popen(["sleep", "60"]) as other:
        start_time = start_time_of(other.pid)
        assert start_time is not None
        monkeypatch.setattr(subprocess, "Popen", lambda *_, pass_fds, **__: popen(["sleep", "60"], pass_fds=pass_fds))
        server = ForkServerProcess({})
        line = server.fork([fork_order(0).spec])
        server._take(Forked(line, 0, other.pid, start_time - 1))
        server.kill(line)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.2)
        server._take(Forked(line, 0, other.pid, start_time))
        assert server.pids(line) == {0: other.pid}
        server.kill(line)
        assert other.wait(30.0) == -signal.SIGKILL
        server.kill_server()
        server.close(30.0)


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
