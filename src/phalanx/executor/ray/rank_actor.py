"""The actor that stands for one rank: it has the rank's bundle, name and log, and its processes are forked for it.

Light itself: a fork server beside it imports torch once, and then makes the rank's process of one line after the other.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import msgspec
import ray

from phalanx.errors import PhalanxError, StartError
from phalanx.executor.local import LocalLauncher, LocalLaunchers
from phalanx.executor.platform import num_cores, thread_environment
from phalanx.executor.ray.fate import end_with, end_with_raylet, raylet_pid
from phalanx.executor.ray.messages import Introduction, Preparation
from phalanx.executor.ray.niceness import as_nice_as_raylet, nicer_than_raylet
from phalanx.transport.interfaces import interface_addresses
from phalanx.transport.liveness import Party
from phalanx.version import __version__
from phalanx.worker.spec import WorkerSpec

MOST_CALLS = 16
"""At a time: the line that runs, one that stands ready, some that are let go, and what is asked of each."""


class RankActor:
    """One rank, in any number of lines. It is called in several threads at a time.

    For each line `make_process`, then `run`; `end` at any time.
    """

    def __init__(self) -> None:
        end_with_raylet()
        as_nice_as_raylet()
        self._launchers = LocalLaunchers()
        self._lines: dict[int, LocalLauncher] = {}
        """By epoch."""
        self._ended: set[int] = set()
        """Epochs of lines that are not to come any more."""
        self._brains: set[Party] = set()
        self._changing = threading.Lock()

    def introduce(self) -> bytes:
        """Who and where this is: an encoded Introduction."""
        return msgspec.msgpack.encode(introduction())

    def make_process(self, preparation: bytes) -> int:
        """Make a process for a line (Preparation), which waits for its order; its pid. Blocks, the first time while
        torch is imported. Raises RuntimeError that says why there is none."""
        told = msgspec.msgpack.decode(preparation, type=Preparation)
        try:
            launcher = self._launchers.launcher(_environment(told))
            with self._changing:
                if told.epoch in self._ended:
                    raise RuntimeError("it is not needed any more")
                self._lines[told.epoch] = launcher
            launcher.warm(told.checkpoint, "cpu" if told.visible_devices is None else "cuda")
            pid = launcher.reserve(told.rank, told.deadline_s)
            if told.epoch in self._ended:  # and there was nothing to kill yet
                launcher.close(0.0)
                raise RuntimeError("it is not needed any more")
            return pid
        except PhalanxError as error:
            raise RuntimeError(str(error)) from None  # an exception of ours does not survive Ray's way of sending it

    def run(self, order: bytes) -> str:
        """Have the process of a line be what the order says (WorkerSpec) until it ends; how it ended."""
        spec = msgspec.msgpack.decode(order, type=WorkerSpec)
        assert spec.queue is not None
        self._end_with(spec.queue.brain)
        launcher = self._lines.get(spec.epoch)
        if launcher is None:
            return "it was ended before it had begun"
        with suppress(StartError):  # its fork server has ended, and it has too
            launcher.employ(spec)
        launcher.await_exits(None)
        return launcher.exits()[spec.rank]

    def end(self, epoch: int) -> None:
        """Kill the process of a line, if it has one, and let it have none any more. Blocks until it is gone."""
        with self._changing:
            self._ended.add(epoch)
            launcher = self._lines.pop(epoch, None)
        if launcher is not None:
            launcher.close(0.0)

    def _end_with(self, brain: Party) -> None:
        """Have this process, and all that come from it, end with whoever the rank works for: the engine, or the node's
        agent, with which all lines of the node end."""
        with self._changing:
            if brain in self._brains:
                return
            self._brains.add(brain)
        end_with(brain)


def introduction() -> Introduction:
    """The calling actor's."""
    context = ray.get_runtime_context()
    return Introduction(
        node_id=context.get_node_id(),
        host=os.uname().nodename,
        pid=os.getpid(),
        raylet_pid=raylet_pid(),
        log=os.readlink("/proc/self/fd/2"),
        version=__version__,
        devices=tuple(map(str, context.get_accelerator_ids().get("GPU", ()))),
        addresses=tuple(interface_addresses()),
        nicer_than_raylet=nicer_than_raylet(),
    )


def _environment(told: Preparation) -> dict[str, str]:
    """Of the rank's processes, beside this one's: what the node has set itself stays, but for what Ray has set."""
    threads = told.threads or max(1, num_cores() // told.ranks_on_host)
    found = {name: value for name, value in told.environment.items() if name not in os.environ}
    found.update(thread_environment(threads))
    if told.visible_devices is not None:  # Ray shows an actor its own device alone
        found["CUDA_VISIBLE_DEVICES"] = told.visible_devices
    return found
