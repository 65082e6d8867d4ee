"""A process that has torch imported and makes workers by forking itself: the import takes seconds, a fork milliseconds.

It runs no model code and has one thread, so hardly anything can wedge it. It speaks with the launcher over two pipes
and dies with it; its workers die with it.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import NamedTuple, NoReturn

import msgspec

from phalanx.executor.letter import Letter
from phalanx.executor.log_stream import log_to_stderr_beside
from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.executor.shared_fate import describe_exit, die_with_parent
from phalanx.transport.liveness import start_time_of
from phalanx.worker.spec import WorkerSpec


def _search_path() -> list[bytes]:
    # As the file system has them: a name need not be UTF-8.
    return [os.fsencode(folder) for folder in sys.path]


class Warm(msgspec.Struct, frozen=True, tag=True):
    """Import what workers of this checkpoint will need."""

    checkpoint: str
    device: str
    """`cpu` or `cuda`."""
    search_path: list[bytes] = msgspec.field(default_factory=_search_path)
    """Where who sends this finds modules: a worker extension may lie beside its script."""


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Start this worker. `line` is a number that its launcher has given all workers of one line."""

    line: int
    spec: WorkerSpec


class Reserve(msgspec.Struct, frozen=True, tag=True):
    """Start a process that becomes this rank's worker when it is told how: others can get ready for it by its pid."""

    line: int
    rank: int


class Employ(msgspec.Struct, frozen=True, tag=True):
    """Have it become that worker."""

    line: int
    spec: WorkerSpec


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Kill the workers of a line that were to be forked by the orders before this one."""

    line: int


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Answer with the same number: whoever asks wants to know whether orders are carried out."""

    number: int


class Forked(msgspec.Struct, frozen=True, tag=True):
    line: int
    rank: int
    pid: int
    start_time: int
    """As `liveness.Party` has it."""


class Exited(msgspec.Struct, frozen=True, tag=True):
    line: int
    rank: int
    how: str


class Answered(msgspec.Struct, frozen=True, tag=True):
    number: int


Order = Warm | Fork | Reserve | Employ | Kill | Ask
Event = Forked | Exited | Answered

HEADER_BYTES = 4
_orders = msgspec.msgpack.Decoder(Order)


def frame(message: Order | Event) -> bytes:
    """One length-prefixed message."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def send(descriptor: int, message: Event) -> None:
    """Write one message; blocks while the pipe is full."""
    view = memoryview(frame(message))
    while view:
        view = view[os.write(descriptor, view) :]


def split_frames(pending: bytearray) -> Iterator[bytes]:
    """Take the whole messages out of what has been read so far."""
    while len(pending) >= HEADER_BYTES:
        end = HEADER_BYTES + int.from_bytes(pending[:HEADER_BYTES], "little")
        if len(pending) < end:
            return
        yield bytes(pending[HEADER_BYTES:end])
        del pending[:end]


class _Child(NamedTuple):
    line: int
    rank: int
    pid: int
    letter: Letter | None = None
    """To one that does not know yet what to be."""


class ForkServer:
    """Serves orders from descriptor `orders` until it is closed; reports on descriptor `events`."""

    def __init__(self, orders: int, events: int) -> None:
        self._orders = orders
        self._events = events
        self._selector = selectors.DefaultSelector()
        self._selector.register(orders, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}  # by pidfd
        self._kills_before = OutOfMemoryKills.now()
        self._unread = bytearray()

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd in self._children:
                    self._reap(key.fd)
                elif not self._read_orders():
                    self._end_all()
                    return

    def _read_orders(self) -> bool:
        data = os.read(self._orders, 1 << 16)
        self._unread += data
        for frame in split_frames(self._unread):
            self._carry_out(_orders.decode(frame))
        return bool(data)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Warm):
            _warm(order)
        elif isinstance(order, Fork):
            self._fork(order.line, order.spec.rank, order.spec)
        elif isinstance(order, Reserve):
            self._fork(order.line, order.rank, None)
        elif isinstance(order, Employ):
            self._employ(order)
        elif isinstance(order, Kill):
            self._kill(order.line)
        else:
            send(self._events, Answered(order.number))

    def _fork(self, line: int, rank: int, spec: WorkerSpec | None) -> None:
        """Without `spec` the child waits for a letter.

        Lack of processes or descriptors ends the line that is to come, and none of those that compute.
        """
        try:
            with ExitStack() as undo:
                letter = Letter() if spec is None else None
                if letter is not None:
                    undo.callback(letter.close)
                pid = self._fork_worker(spec, letter)
                undo.callback(_end, pid)
                start_time = start_time_of(pid)
                pidfd = os.pidfd_open(pid)
                undo.callback(os.close, pidfd)
                self._selector.register(pidfd, selectors.EVENT_READ)
                undo.pop_all()
        except OSError as error:
            send(self._events, Exited(line, rank, f"could not be forked: {error.strerror}"))
            return
        assert start_time is not None, "it is there until it is reaped"
        self._children[pidfd] = _Child(line, rank, pid, letter)
        send(self._events, Forked(line, rank, pid, start_time))

    def _employ(self, order: Employ) -> None:
        """It may have ended meanwhile."""
        for child in self._children.values():
            if child.line == order.line and child.rank == order.spec.rank and child.letter is not None:
                try:
                    child.letter.write(msgspec.msgpack.encode(order.spec))
                except OSError:  # no memory: it shall not wait for ever
                    traceback.print_exc()
                    os.kill(child.pid, signal.SIGKILL)

    def _fork_worker(self, spec: WorkerSpec | None, letter: Letter | None) -> int:
        """Its pid. Raises OSError."""
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_worker(spec, letter, server_pid)
        return pid

    def _become_worker(self, spec: WorkerSpec | None, letter: Letter | None, server_pid: int) -> NoReturn:
        code = 1
        try:
            die_with_parent(server_pid)
            self._selector.close()
            for pidfd, child in self._children.items():
                os.close(pidfd)
                if child.letter is not None:
                    child.letter.close()
            os.close(self._orders)
            os.close(self._events)
            if letter is not None:
                spec = msgspec.msgpack.decode(letter.read(), type=WorkerSpec)
                letter.close()
            assert spec is not None
            # What is no warning is the same for all ranks, mostly.
            level = logging.INFO if spec.rank == 0 else logging.WARNING
            log_to_stderr_beside(f"%(levelname)s rank {spec.rank}: %(message)s", level=level)
            from phalanx.worker.process import run

            code = run(spec)
        except BaseException:  # whatever happens, the child must not return into the server's loop
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reap(self, pidfd: int) -> None:
        child = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        if child.letter is not None:
            child.letter.close()
        _, status = os.waitpid(child.pid, 0)
        how = describe_exit(os.waitstatus_to_exitcode(status), self._kills_before)
        send(self._events, Exited(child.line, child.rank, how))

    def _kill(self, line: int | None = None) -> None:
        """Those of a line, or all; they are reaped when they have ended."""
        for child in self._children.values():
            if line is None or child.line == line:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)

    def _end_all(self) -> None:
        self._kill()
        for child in self._children.values():
            os.waitpid(child.pid, 0)


def _end(pid: int) -> None:
    """Of a child that is not reaped yet."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _warm(order: Warm) -> None:
    """Import the model's own module before the fork. What is wrong with it, or its checkpoint, the workers report."""
    from phalanx.models.attention import import_backend
    from phalanx.models.model import import_definition

    # The launcher's first, so that a name means the same module in both. Only here is what the environment has added.
    sys.path[:] = dict.fromkeys([*map(os.fsdecode, order.search_path), *sys.path])
    with suppress(Exception):  # an import may raise any, and there are lines that compute
        import_backend(order.device)
    with suppress(Exception):
        import_definition(order.checkpoint)


def main() -> None:
    """Usage: python -m phalanx.executor.fork_server LAUNCHER_PID ORDERS_FD EVENTS_FD"""
    launcher_pid, orders, events = map(int, sys.argv[1:])
    die_with_parent(launcher_pid)
    # Ctrl-C reaches every process of the terminal's group; it is the server that decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import phalanx.worker.process  # noqa: F401  (brings torch in, before the first fork)

    with suppress(BrokenPipeError):  # the launcher is gone: nobody is left to report to
        ForkServer(orders, events).serve()
    os._exit(0)  # with torch imported, the interpreter would take its time to tidy up


if __name__ == "__main__":
    main()
