"""One process for each rank on this host, forked from a server that has torch imported."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from phalanx.errors import DeadlineError, StartError
from phalanx.executor.fork_server_process import ForkServerProcess
from phalanx.worker.spec import WorkerSpec

END_DEADLINE_S = 10.0
"""For the kernel to end ranks after SIGKILL; freeing a GPU's memory takes a second or two."""

ASK_S = 3.0
"""A fork server that carries out no order for so long is stopped, or worse."""


class LocalLauncher:
    """The ranks of one line on this host."""

    def __init__(self, environment: Mapping[str, str], server: ForkServerProcess | None = None) -> None:
        """On `server`, which outlives the ranks and has its own environment, or on one that ends with them."""
        self._server = server if server is not None else ForkServerProcess(environment)
        self._owns_server = server is None
        self._line: int | None = None

    def warm(self, checkpoint: str, device: str) -> None:
        """Have the model's code for `device` imported before the first worker is forked."""
        self._server.warm(checkpoint, device)

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """As Launcher says. Once only."""
        assert self._line is None, "started twice"
        self._line = self._server.fork(specs)

    def reserve(self, rank: int, timeout_s: float) -> int:
        """The pid of a process that becomes this rank when `employ` says how. In place of `start`, for one rank.

        Raises StartError if it does not come, DeadlineError if that is not known in time.
        """
        assert self._line is None, "started twice"
        self._line = self._server.reserve(rank)
        if not self._server.await_forks(self._line, timeout_s):
            raise DeadlineError("a process", f"the fork server of rank {rank}", timeout_s)
        if (how := self.exits().get(rank)) is not None:
            raise StartError(f"rank {rank}", "being forked", how)
        return self.pids()[rank]

    def employ(self, spec: WorkerSpec) -> None:
        """Have the process that was reserved be this worker. Raises StartError."""
        assert self._line is not None
        self._server.employ(self._line, spec)

    def exits(self) -> dict[int, str]:
        return self._server.exits(self._line) if self._line is not None else {}

    def pids(self) -> dict[int, int]:
        """Process ids of the workers forked so far, by rank."""
        return self._server.pids(self._line) if self._line is not None else {}

    def kill(self) -> None:
        """Have every rank's process killed; returns before they have ended. For any thread."""
        if self._line is not None:
            self._server.kill(self._line)

    def await_exits(self, timeout_s: float | None) -> bool:
        """Wait until every rank that was started has ended; False if one has not after `timeout_s`; None for ever."""
        return self._line is None or self._server.await_exits(self._line, timeout_s)

    def close(self, timeout_s: float) -> None:
        """As Launcher says. Raises DeadlineError if the kernel cannot end the processes."""
        expires_at = time.monotonic() + timeout_s
        self.await_exits(timeout_s)
        if self._owns_server:
            self._server.close(max(expires_at - time.monotonic(), 0.0))
        elif not self.await_exits(0.0):
            self._end_ranks()

    def _end_ranks(self) -> None:
        self.kill()
        if self.await_exits(ASK_S):
            return
        if not self._server.answers(ASK_S):  # nobody says whether they have ended, nor forks any more
            self._server.kill_server()
        if not self.await_exits(END_DEADLINE_S):
            pids = ", ".join(f"rank {rank} (pid {pid})" for rank, pid in self.pids().items())
            raise DeadlineError("the end after SIGKILL", pids or "ranks", END_DEADLINE_S)


class LocalLaunchers:
    """Launchers of any number of lines on one fork server: torch is imported once, a line then starts in a moment.

    A fork server that has ended is replaced, as is one that does nothing any more and has no ranks. The first
    launcher's environment is that of all. For any thread. A context manager.
    """

    def __init__(self) -> None:
        self._server: ForkServerProcess | None = None
        self._making = threading.Lock()
        self._is_closed = False

    def launcher(self, environment: Mapping[str, str]) -> LocalLauncher:
        """For `start_executor`. Raises StartError."""
        with self._making:
            if self._server is not None and not self._server.answers(ASK_S):
                if self._server.has_ranks:  # they end with it
                    raise StartError("the fork server", "starting", f"it has not answered for {ASK_S:.3g} s")
                self._server.close(0.0)
                self._server = None
            if self._is_closed:
                raise StartError("the fork server", "starting", "it was closed")
            if self._server is None:
                self._server = ForkServerProcess(environment)
            return LocalLauncher(environment, self._server)

    def close(self) -> None:
        """End all ranks, those of lines that are just starting, too. May be called more than once."""
        self._is_closed = True
        if (server := self._server) is not None:
            server.close(0.0)
        with self._making:  # who waits for an answer of that server has none now
            if self._server is not None:
                self._server.close(0.0)

    def __enter__(self) -> LocalLaunchers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
