"""The process that watches the ranks of this host, and what it finds."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import IO

import msgspec

from phalanx.config import Config
from phalanx.errors import DeadlineError, StartError
from phalanx.executor.shared_fate import describe_exit, die_with_parent
from phalanx.ledger.dump import DumpOrder, prepare
from phalanx.ledger.journal import JOURNAL_BYTES
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watcher import WatchedRank, WatchOrder, watch
from phalanx.transport.shared_memory import SharedSegment
from phalanx.worker.spec import WorkerSpec

SPAWN_DEADLINE_S = 30.0
END_DEADLINE_S = 5.0

log = logging.getLogger("phalanx.ledger")


class Watching:
    """A watcher in a process of its own, from its start to `close`. Logs its verdicts."""

    def __init__(self, order: WatchOrder, on_hopeless: Callable[[], None]) -> None:
        """Calls `on_hopeless`, in another thread, once it is known that ranks can never meet. Raises StartError."""
        self._on_hopeless = on_hopeless
        self._found: Verdict | None = None
        self._changed = threading.Condition()
        self._stop_read, self._stop_write = os.pipe()
        spawned: Future[subprocess.Popen[bytes]] = Future()
        # The kernel kills the watcher when the *thread* that started it ends: it must be one that lives as long.
        self._thread = threading.Thread(target=self._run, args=(order, spawned), name="phalanx-watching", daemon=True)
        self._thread.start()
        try:
            self._process = spawned.result(SPAWN_DEADLINE_S)
        except OSError as error:  # TimeoutError is one
            os.close(self._stop_write)
            raise StartError("the watcher", "starting", str(error) or f"waited {SPAWN_DEADLINE_S} s") from error

    @property
    def verdict(self) -> Verdict | None:
        """What was found last."""
        return self._found

    def await_verdict(self, timeout_s: float) -> Verdict | None:
        """Block until there is one, for `timeout_s` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._found is not None, timeout_s)
            return self._found

    def close(self) -> None:
        """End the watcher; none is left when this returns. Raises DeadlineError if the kernel cannot end it."""
        if self._stop_write < 0:
            return
        os.close(self._stop_write)
        self._stop_write = -1
        self._thread.join(END_DEADLINE_S)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join(END_DEADLINE_S)
            if self._thread.is_alive():
                watcher = f"the watcher (pid {self._process.pid})"
                raise DeadlineError("the end after SIGKILL", watcher, END_DEADLINE_S)

    def _run(self, order: WatchOrder, spawned: Future[subprocess.Popen[bytes]]) -> None:
        try:
            process, verdicts = _spawn(order, self._stop_read)
        except OSError as error:
            spawned.set_exception(error)
            return
        finally:
            os.close(self._stop_read)
        spawned.set_result(process)
        with verdicts:
            for line in verdicts:
                verdict = msgspec.json.decode(line, type=Verdict)
                log.log(logging.ERROR if verdict.is_final else logging.WARNING, "verdict: %s", verdict)
                with self._changed:
                    self._found = verdict
                    self._changed.notify_all()
                if verdict.is_hopeless:
                    self._on_hopeless()
        code = process.wait()
        if self._stop_write >= 0 and self._found is None:  # nobody has asked it to end
            log.warning("the watcher has ended, %s: nobody says any more who is to blame", describe_exit(code))


def with_journals(specs: Sequence[WorkerSpec], resources: ExitStack) -> list[WorkerSpec]:
    """The same workers, each with a journal that this process holds, too, until `resources` are let go."""
    journals = [
        resources.enter_context(SharedSegment.create(JOURNAL_BYTES, f"journal of rank {spec.rank}")) for spec in specs
    ]
    return [
        msgspec.structs.replace(spec, journal=journal.handle) for spec, journal in zip(specs, journals, strict=True)
    ]


def watch_order(specs: Sequence[WorkerSpec], dump: DumpOrder | None = None) -> WatchOrder:
    """To watch these workers, which are on this host and have journals."""
    groups = {group.name: group.ranks for spec in specs for group in spec.groups if group.size > 1}
    return WatchOrder(
        ranks=tuple(
            WatchedRank(
                rank=spec.rank,
                node=os.uname().nodename,
                groups=("", *(group.name for group in spec.groups)),
                journal=spec.journal,
            )
            for spec in specs
            if spec.journal is not None
        ),
        groups=groups,
        dump=dump,
    )


def dump_order(config: Config) -> DumpOrder | None:
    """Where verdicts are to be dumped, if anywhere. Raises ConfigError if that is not possible."""
    directory = config.executor.ledger_dump
    if directory is None:
        return None
    prepare(directory)
    return DumpOrder(directory=os.path.abspath(directory), settings=config.changed())


def _spawn(order: WatchOrder, stop: int) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start the watcher; returns it and the end at which verdicts come out. Raises OSError."""
    command = [sys.executable, "-m", "phalanx.executor.watching", *map(str, (os.getpid(), stop))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(stop,))
    assert process.stdin is not None and process.stdout is not None
    with process.stdin as stdin:
        stdin.write(msgspec.msgpack.encode(order))
    return process, process.stdout


def main() -> None:
    """Usage: python -m phalanx.executor.watching PARENT_PID STOP_FD < ORDER > VERDICTS"""
    parent_pid, stop = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the engine that decides when it ends
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s watcher: %(message)s")
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WatchOrder)
    watch(order, stop, sys.stdout.fileno())


if __name__ == "__main__":
    main()
