"""One process for each rank on this host, forked from a server that has torch imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import IO

import msgspec

from phalanx.errors import DeadlineError, StartError
from phalanx.executor.fork_server import Event, Exited, Fork, Forked, Warm, send, split_frames
from phalanx.executor.shared_fate import describe_exit
from phalanx.worker.spec import WorkerSpec

SPAWN_DEADLINE_S = 30.0
REAP_DEADLINE_S = 1.0
"""For the fork server to see its workers' end. Without it they die too, but perhaps a moment after `close` returned."""

KILL_DEADLINE_S = 10.0
"""For the kernel to end the fork server, and with it the ranks; freeing a GPU's memory takes a second or two."""

_events = msgspec.msgpack.Decoder(Event)


class LocalLauncher:
    """Starts the fork server at once, so that torch is imported while the caller still reads its configuration."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._ranks: set[int] = set()
        self._pids: dict[int, int] = {}
        self._exits: dict[int, str] = {}
        self._server_exit: str | None = None
        self._changed = threading.Condition()
        orders_read, self._orders = os.pipe()
        spawned: Future[subprocess.Popen[bytes]] = Future()
        # The kernel kills the fork server when the *thread* that started it ends, so the thread that starts it is one
        # that lives as long as the launcher: the same that reads its events.
        self._thread = threading.Thread(
            target=self._run, args=(spawned, orders_read, dict(environment)), name="phalanx-launcher", daemon=True
        )
        self._thread.start()
        try:
            self._process = spawned.result(SPAWN_DEADLINE_S)
        except OSError as error:  # TimeoutError is one
            os.close(self._orders)
            self._thread.join(SPAWN_DEADLINE_S)  # it closes the pipe's other end
            raise StartError("the fork server", "starting", str(error) or f"waited {SPAWN_DEADLINE_S} s") from error

    def warm(self, checkpoint: str) -> None:
        """Have the model's code imported before the first worker is forked."""
        self._send(Warm(checkpoint))

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """As Launcher says. Again only when all that were started before have ended."""
        with self._changed:
            assert self._exits.keys() >= self._ranks, "ranks of the last start are left"
            self._ranks = {spec.rank for spec in specs}
            self._pids.clear()
            self._exits.clear()
        for spec in specs:
            self._send(Fork(spec))

    def exits(self) -> dict[int, str]:
        with self._changed:
            return dict(self._exits)

    def pids(self) -> dict[int, int]:
        """Process ids of the workers forked so far, by rank."""
        with self._changed:
            return dict(self._pids)

    def kill(self) -> None:
        """Have every rank's process killed; returns before they have ended. For any thread."""
        with self._changed:
            for rank in self._pids.keys() - self._exits.keys():
                with suppress(ProcessLookupError):
                    os.kill(self._pids[rank], signal.SIGKILL)

    def await_exits(self, timeout_s: float) -> bool:
        """Wait until every rank that was started has ended; False if one has not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._server_exit is not None or self._exits.keys() >= self._ranks, timeout=timeout_s
            )

    def close(self, timeout_s: float) -> None:
        """As Launcher says. Raises DeadlineError if the kernel cannot end the processes."""
        expires_at = time.monotonic() + timeout_s
        self.await_exits(timeout_s)
        if self._orders >= 0:
            os.close(self._orders)  # the server then kills what is left and ends
            self._orders = -1
        self._thread.join(max(expires_at - time.monotonic(), REAP_DEADLINE_S if self._ranks else 0.0))
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join(KILL_DEADLINE_S)
            if self._thread.is_alive():
                server = f"the fork server (pid {self._process.pid})"
                raise DeadlineError("the end after SIGKILL", server, KILL_DEADLINE_S)

    def _send(self, order: Warm | Fork) -> None:
        try:
            send(self._orders, order)
        except BrokenPipeError:
            self._thread.join(1.0)
            raise StartError("the fork server", "starting", self._server_exit or "it closed its pipe") from None

    def _run(self, spawned: Future[subprocess.Popen[bytes]], orders_read: int, environment: dict[str, str]) -> None:
        try:
            process, events = _spawn(orders_read, environment)
        except OSError as error:
            spawned.set_exception(error)
            return
        finally:
            os.close(orders_read)
        spawned.set_result(process)
        with events:
            self._read_events(events)
        how = describe_exit(process.wait())
        with self._changed:
            self._server_exit = how
            for rank in self._ranks - self._exits.keys():  # some may never have been forked
                self._exits[rank] = f"its fork server ended: {how}"
            self._changed.notify_all()

    def _read_events(self, events: IO[bytes]) -> None:
        unread = bytearray()
        while data := events.read(1 << 16):
            unread += data
            with self._changed:
                for frame in split_frames(unread):
                    event = _events.decode(frame)
                    if isinstance(event, Forked):
                        self._pids[event.rank] = event.pid
                    else:
                        assert isinstance(event, Exited)
                        self._exits[event.rank] = event.how
                self._changed.notify_all()


def _spawn(orders_read: int, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start the fork server; returns it and the end at which its events come out. Raises OSError."""
    events_read, events_write = os.pipe()
    events = os.fdopen(events_read, "rb", buffering=0)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "phalanx.executor.fork_server", *map(str, (os.getpid(), orders_read, events_write))],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            pass_fds=(orders_read, events_write),
        )
    except OSError:
        events.close()
        raise
    finally:
        os.close(events_write)
    return process, events
