"""One process for each rank on this host, forked from a server that has torch imported."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import msgspec

from phalanx.errors import StartError
from phalanx.executor.fork_server import Event, Exited, Fork, Forked, Warm, send, split_frames
from phalanx.worker.spec import WorkerSpec

_events = msgspec.msgpack.Decoder(Event)


class LocalLauncher:
    """Starts the fork server at once, so that torch is imported while the caller still reads its configuration."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pids: dict[int, int] = {}
        self._exits: dict[int, str] = {}
        self._server_exit: str | None = None
        self._changed = threading.Condition()
        orders_read, self._orders = os.pipe()
        self._events, events_write = os.pipe()
        # The kernel kills the fork server when the *thread* that started it ends, so the thread that starts it is one
        # that lives as long as the launcher: the same that reads its events.
        self._thread = threading.Thread(
            target=self._run, args=(orders_read, events_write, dict(environment)), name="phalanx-launcher", daemon=True
        )
        self._thread.start()

    def warm(self, checkpoint: str) -> None:
        """Have the model's code imported before the first worker is forked."""
        self._send(Warm(checkpoint))

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        for spec in specs:
            self._send(Fork(spec))

    def exits(self) -> dict[int, str]:
        with self._changed:
            return dict(self._exits)

    def pids(self) -> dict[int, int]:
        """Process ids of the workers forked so far, by rank."""
        with self._changed:
            return dict(self._pids)

    def close(self, timeout_s: float) -> None:
        expires_at = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: self._server_exit is not None or self._exits.keys() >= self._pids.keys(), timeout=timeout_s
            )
        if self._orders >= 0:
            os.close(self._orders)  # the server then kills what is left and ends
            self._orders = -1
        self._thread.join(max(expires_at - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    def _send(self, order: Warm | Fork) -> None:
        try:
            send(self._orders, order)
        except BrokenPipeError:
            self._thread.join(1.0)
            raise StartError("the fork server", "starting", self._server_exit or "it closed its pipe") from None

    def _run(self, orders_read: int, events_write: int, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "phalanx.executor.fork_server"]
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), str(orders_read), str(events_write)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            pass_fds=(orders_read, events_write),
        )
        os.close(orders_read)
        os.close(events_write)
        self._read_events()
        code = self._process.wait()
        with self._changed:
            self._server_exit = f"the fork server ended with exit code {code}"
            for rank in self._pids.keys() - self._exits.keys():
                self._exits[rank] = f"killed, because {self._server_exit}"
            self._changed.notify_all()

    def _read_events(self) -> None:
        unread = bytearray()
        with contextlib.closing(os.fdopen(self._events, "rb", buffering=0)) as events:
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
