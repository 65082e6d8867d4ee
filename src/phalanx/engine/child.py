"""The engine's process as its parent sees it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from phalanx.errors import DeadlineError
from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.executor.shared_fate import describe_exit
from phalanx.transport.stream import stream_pair

ENGINE_COMMAND = (sys.executable, "-m", "phalanx.engine.process")

KILL_TIMEOUT_S = 10.0
"""How long the kernel may take to end a process after SIGKILL; freeing a GPU's memory takes a second or two."""


class EngineChild:
    """A child process, watched through a pidfd by the event loop that spawned it.

    The kernel kills the child when the *thread* that spawned it ends (see `die_with_parent`): it must be a thread that
    lives as long as the engine shall.
    """

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int, kills_before: OutOfMemoryKills) -> None:
        """Use `spawn`."""
        self.pid = process.pid
        self.descriptor = descriptor
        """Our end of the stream to it; whoever opens it owns it."""
        self._process = process
        self._kills_before = kills_before
        self._exited = asyncio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._reap)

    @classmethod
    def spawn(
        cls, command: Sequence[str] = ENGINE_COMMAND, environment: Mapping[str, str] | None = None
    ) -> EngineChild:
        """Start `command` with two more arguments: the number of its stream's descriptor, and our pid.

        `environment` comes over this process's own.
        """
        kills_before = OutOfMemoryKills.now()
        ours, theirs = stream_pair()
        with ExitStack() as on_failure:
            on_failure.callback(os.close, ours)
            try:
                process = subprocess.Popen(
                    [*command, str(theirs), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs,),
                    env={**os.environ, **(environment or {})},
                    # Out of the terminal's group: Ctrl-C goes to the server alone, which decides when the engine ends.
                    process_group=0,
                )
            finally:
                os.close(theirs)
            on_failure.callback(process.wait, KILL_TIMEOUT_S)
            on_failure.callback(process.kill)
            child = cls(process, ours, kills_before)
            on_failure.pop_all()
            return child

    async def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False if it has not come after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    def begin_kill(self) -> None:
        """SIGKILL, which also ends a stopped process. Returns at once: `wait` or `kill` see to the end."""
        if self._process.returncode is None:
            self._process.kill()

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Blocks the event loop for that moment: no cancellation may come in between.

        Raises DeadlineError if the kernel cannot end it.
        """
        if self._process.returncode is None:
            self.begin_kill()
            try:
                self._process.wait(KILL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise DeadlineError("the end after SIGKILL", f"process {self.pid}", KILL_TIMEOUT_S) from None
            self._reap()

    def how_it_ended(self) -> str:
        """In words, such as `killed by SIGKILL`."""
        code = self._process.returncode
        return "still running" if code is None else describe_exit(code, self._kills_before)

    def _reap(self) -> None:
        if self._exited.is_set():
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._exited.set()
