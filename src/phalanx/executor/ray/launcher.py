"""Ranks whose processes are there already, each of an actor: sets them going, notices their end, ends them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

from phalanx.errors import DeadlineError
from phalanx.executor.ending import await_ends, kill, living
from phalanx.executor.ray.calls import Outcome
from phalanx.executor.ray.fate import on_end_of
from phalanx.executor.ray.line_processes import LineProcesses
from phalanx.executor.ray.liveness import ActorWatch
from phalanx.executor.shared_fate import WITH_ACTOR, WITH_AGENT, WITH_RAYLET, describe_exit
from phalanx.worker.spec import WorkerSpec

REAP_DEADLINE_S = 0.5
"""For actors to say how ranks ended that were killed. Those whose node is gone do not."""
END_DEADLINE_S = 10.0
"""For the kernel to end ranks after SIGKILL; freeing a GPU's memory takes a second or two."""
POLL_S = 0.005


class RayLauncher:
    """Of a line's processes, whose nodes are linked. `let_go` when nothing of them is of interest any more."""

    def __init__(self, processes: LineProcesses) -> None:
        self._processes = processes
        self._local = living((placed.pid for placed in processes.placed if placed.is_driver_node), "a rank")
        self._exits: dict[int, str] = {}
        self._lock = threading.Lock()
        self._watch: ActorWatch | None = None
        self._raylet_watch = ExitStack()
        self._is_closing = False
        self._has_ended = False

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        calls = {self._processes.run_rank(spec): str(spec.rank) for spec in specs}
        self._watch = ActorWatch({**calls, **self._processes.run_nodes()}, self._note_end)
        if self._processes.raylet is not None:
            self._raylet_watch.callback(on_end_of(self._processes.raylet, self._note_end_of_raylet))

    def exits(self) -> dict[int, str]:
        with self._lock:
            return dict(self._exits)

    def kill(self) -> None:
        """Have every rank's process killed, wherever it is; returns before they have ended. For any thread."""
        for party in self._local:
            kill(party)
        self._processes.kill_remote()

    def close(self, timeout_s: float) -> None:
        """As Launcher says: on this node, and on others as far as they can be reached."""
        expires_at = time.monotonic() + timeout_s
        while len(self.exits()) < len(self._processes.placed) and time.monotonic() < expires_at:
            time.sleep(POLL_S)
        self._is_closing = True
        self._raylet_watch.close()
        for party in self._local:  # Ray may do it late, without its head never
            kill(party)
        self._processes.kill()
        if not self._has_ended:  # later the agents may be others
            self._processes.end_remote()
            self._has_ended = True
        if self._watch is not None:
            self._watch.wait_for({str(placed.rank) for placed in self._processes.placed}, REAP_DEADLINE_S)
        if left := await_ends(self._local, END_DEADLINE_S):
            raise DeadlineError("the end after SIGKILL", ", ".join(map(str, left)), END_DEADLINE_S)

    def let_go(self) -> None:
        """Be told of no more ends. Before Ray is shut down."""
        if self._watch is not None:
            self._watch.close()

    def _note_end(self, name: str, end: Outcome) -> None:
        """`name` is a rank's number, or the id of an agent's node."""
        if self._is_closing:
            return
        if name.isdigit():
            self._note_end_of_rank(int(name), end)
            return
        for placed in self._processes.placed:
            if placed.node_id == name:
                self._note(placed.rank, f"{WITH_AGENT}: {end.how} (on {placed.node})")

    def _note_end_of_rank(self, rank: int, end: Outcome) -> None:
        how = f"{WITH_ACTOR}: {end.how}" if end.has_actor_ended else end.how
        good = how == describe_exit(0)
        self._note(
            rank, how if good else f"{how} (on {self._processes.placed[rank].node}); {self._processes.last_words(rank)}"
        )

    def _note_end_of_raylet(self) -> None:
        """Ray itself can say nothing any more then."""
        for placed in self._processes.placed:
            if placed.is_driver_node:
                self._note(placed.rank, f"{WITH_RAYLET} (on {placed.node})")

    def _note(self, rank: int, how: str) -> None:
        with self._lock:
            self._exits.setdefault(rank, how)
