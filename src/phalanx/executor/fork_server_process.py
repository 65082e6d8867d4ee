"""The fork server as its parent has it: the ranks of any number of lines, one beside the other."""

from __future__ import annotations

import itertools
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import IO

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError, StartError
from phalanx.executor.ending import kill
from phalanx.executor.fork_server import (
    Ask,
    Employ,
    Event,
    Exited,
    Fork,
    Forked,
    Kill,
    Order,
    Reserve,
    Warm,
    frame,
    split_frames,
)
from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.executor.output import output_until_end
from phalanx.executor.shared_fate import WITH_FORK_SERVER, describe_exit
from phalanx.ledger.journal import note_process
from phalanx.transport.liveness import Party, ending_of, start_time_of, state_of
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.spec import WorkerSpec

SPAWN_DEADLINE_S = 30.0
IMPORT_S = 30.0
"""It answers nothing before it has torch imported."""
TAKE_DEADLINE_S = 5.0
"""For a fork server to take an order out of a full pipe: it does so between two forks."""
REAP_DEADLINE_S = 1.0
"""For the fork server to see its workers' end. Without it they die too, but perhaps a moment after `close` returned."""

KILL_DEADLINE_S = 10.0
"""For the kernel to end the fork server, and with it the ranks; freeing a GPU's memory takes a second or two."""

_events = msgspec.msgpack.Decoder(Event)


class _Line:
    """What is known of the workers of one line."""

    def __init__(self, ranks: set[int], journals: dict[int, SegmentHandle]) -> None:
        self.ranks = ranks
        self.journals = journals
        self.workers: dict[int, Party] = {}
        self.exits: dict[int, str] = {}
        self.endings: dict[int, str] = {}
        """How workers end, as was seen before they had ended: what was told once is told again."""

    @property
    def is_forked(self) -> bool:
        return self.workers.keys() | self.exits.keys() >= self.ranks

    @property
    def is_over(self) -> bool:
        return self.exits.keys() >= self.ranks


class ForkServerProcess:
    """Starts the fork server at once, so that torch is imported while the caller still reads its configuration.

    For any thread.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises StartError."""
        self._lines: dict[int, _Line] = {}
        self._numbers = itertools.count()
        self._answered = -1
        self._made_at = time.monotonic()
        self._ended: str | None = None
        self._kills_before = OutOfMemoryKills.now()
        self._changed = threading.Condition()
        self._ordering = threading.Lock()
        orders_read, self._orders = os.pipe()
        os.set_blocking(self._orders, False)
        spawned: Future[subprocess.Popen[bytes]] = Future()
        # The kernel kills the fork server when the *thread* that started it ends, so the thread that starts it is one
        # that lives as long as this object: the same that reads its events.
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
        self._start_time = start_time_of(self._process.pid) or 0

    @property
    def ended(self) -> str | None:
        """How it has ended; None while it runs."""
        with self._changed:
            return self._ended

    def warm(self, checkpoint: str, device: str) -> None:
        """Have the model's code imported before the first worker is forked."""
        self._send(Warm(checkpoint, device))

    def fork(self, specs: Sequence[WorkerSpec]) -> int:
        """Set the workers of a line off; gives the line's number. Returns before they have been forked."""
        journals = {spec.rank: spec.journal for spec in specs if spec.journal is not None}
        line = self._begin_line({spec.rank for spec in specs}, journals)
        for spec in specs:
            self._send(Fork(line, spec))
        return line

    def reserve(self, rank: int) -> int:
        """Start a process that waits for `employ`, alone in a line; gives the line's number. Returns before it has been
        forked."""
        line = self._begin_line({rank}, {})
        self._send(Reserve(line, rank))
        return line

    def employ(self, line: int, spec: WorkerSpec) -> None:
        """Have the process that was reserved be this worker."""
        self._send(Employ(line, spec))

    def await_forks(self, line: int, timeout_s: float) -> bool:
        """Wait until every rank of a line has been forked, or has ended; False if not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._lines[line].is_forked, timeout=timeout_s)

    @property
    def has_ranks(self) -> bool:
        """Whether some that were asked for have not ended."""
        with self._changed:
            return any(not state.is_over for state in self._lines.values())

    def exits(self, line: int) -> dict[int, str]:
        """Ranks of a line that have ended so far, and how; also of those that have begun to, as far as that is told: a
        GPU's memory takes a tenth of a second to be given back."""
        with self._changed:
            state = self._lines[line]
            living = {rank: worker for rank, worker in state.workers.items() if rank not in state.exits}
        ending = self._ending(living)
        with self._changed:
            state.endings.update(ending)
            return {**state.endings, **state.exits}

    def _ending(self, workers: Mapping[int, Party]) -> dict[int, str]:
        """Those that end, and not with the fork server, as is said when that has ended."""
        try:
            if state_of(self._process.pid, self._start_time) is None:
                return {}
        except OSError:  # no descriptor is left to look
            return {}
        codes = {rank: ending_of(worker.pid, worker.start_time) for rank, worker in workers.items()}
        return {rank: describe_exit(code, self._kills_before) for rank, code in codes.items() if code is not None}

    def pids(self, line: int) -> dict[int, int]:
        """Process ids of the workers forked so far, by rank."""
        with self._changed:
            return {rank: worker.pid for rank, worker in self._lines[line].workers.items()}

    def kill(self, line: int) -> None:
        """Have every process of a line killed, also those that are still to be forked; returns before they have ended.

        What is asked of a fork server that is stopped is done when it goes on.
        """
        with self._changed:
            state = self._lines[line]
            are_all_killed = state.is_forked
            for rank in state.workers.keys() - state.exits.keys():
                try:
                    kill(state.workers[rank])
                except OSError:  # no descriptor is left; the server has one of each
                    are_all_killed = False
        if not are_all_killed:
            with suppress(StartError):  # the server has ended, and they with it
                self._send(Kill(line))

    def await_exits(self, line: int, timeout_s: float | None) -> bool:
        """Wait until every rank of a line has ended; False if one has not after `timeout_s`; None for ever."""
        with self._changed:
            return self._changed.wait_for(lambda: self._lines[line].is_over, timeout=timeout_s)

    def answers(self, timeout_s: float) -> bool:
        """Whether orders are carried out. Blocks for `timeout_s` at most, but while torch is imported."""
        number = next(self._numbers)
        if self._answered < 0:
            timeout_s = max(timeout_s, self._made_at + IMPORT_S - time.monotonic())
        with suppress(StartError):
            self._send(Ask(number))
            with self._changed:
                self._changed.wait_for(lambda: self._answered >= number or self._ended is not None, timeout=timeout_s)
                return self._answered >= number
        return False

    def close(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the server to end, which kills what is left of all lines, then kill it.

        Raises DeadlineError if the kernel cannot end it. May be called more than once, and from several threads.
        """
        with self._ordering:
            if self._orders >= 0:
                os.close(self._orders)  # the server then kills what is left and ends
                self._orders = -1
        with self._changed:
            has_ranks = any(state.ranks for state in self._lines.values())
        self._thread.join(max(timeout_s, REAP_DEADLINE_S if has_ranks else 0.0))
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join(KILL_DEADLINE_S)
            if self._thread.is_alive():
                server = f"the fork server (pid {self._process.pid})"
                raise DeadlineError("the end after SIGKILL", server, KILL_DEADLINE_S)

    def kill_server(self) -> None:
        """End the server, and so all its workers, however it is. Returns before they have ended."""
        self._process.kill()

    def _begin_line(self, ranks: set[int], journals: dict[int, SegmentHandle]) -> int:
        with self._changed:
            line = next(self._numbers)
            self._lines[line] = state = _Line(ranks, journals)
            if self._ended is not None:
                self._end_of_server(state, self._ended)
        return line

    def _send(self, order: Order) -> None:
        try:
            with self._ordering:
                if self._orders < 0:
                    raise StartError("the fork server", "starting", "it was closed")
                self._write(memoryview(frame(order)))
        except BrokenPipeError:
            self._thread.join(1.0)
            raise StartError("the fork server", "starting", self.ended or "it closed its pipe") from None

    def _write(self, order: memoryview) -> None:
        """What is left of an order that is not taken is not sent any more: the server must be ended then."""
        deadline_s = TAKE_DEADLINE_S if self._answered >= 0 else IMPORT_S
        expires_at = time.monotonic() + deadline_s
        poll = select.poll()
        poll.register(self._orders, select.POLLOUT)
        while order:
            if not poll.poll(max(expires_at - time.monotonic(), 0.0) * 1000):
                self.kill_server()
                raise StartError(
                    "the fork server", "starting", f"it took no order for {deadline_s:.3g} s: it was killed"
                )
            with suppress(BlockingIOError):
                order = order[os.write(self._orders, order) :]

    def _run(self, spawned: Future[subprocess.Popen[bytes]], orders_read: int, environment: dict[str, str]) -> None:
        try:
            process, events, pidfd = _spawn(orders_read, environment)
        except OSError as error:
            spawned.set_exception(error)
            return
        finally:
            os.close(orders_read)
        spawned.set_result(process)
        with events:
            self._read_events(events.fileno(), pidfd)
        os.close(pidfd)
        how = describe_exit(process.wait(), self._kills_before)
        with self._changed:
            self._ended = how
            for state in self._lines.values():
                self._end_of_server(state, how)
            self._changed.notify_all()

    def _end_of_server(self, state: _Line, how: str) -> None:
        for rank in state.ranks - state.exits.keys():  # some may never have been forked
            state.exits[rank] = f"{WITH_FORK_SERVER}: {how}"

    def _read_events(self, events: int, pidfd: int) -> None:
        unread = bytearray()
        for data in output_until_end(events, pidfd):
            unread += data
            with self._changed:
                for frame in split_frames(unread):
                    self._take(_events.decode(frame))
                self._changed.notify_all()

    def _take(self, event: Event) -> None:
        if isinstance(event, Forked):
            state = self._lines[event.line]
            state.workers[event.rank] = Party(f"rank {event.rank}", event.pid, event.start_time)
            if event.rank in state.journals:
                _note_process(state.journals[event.rank], event)
        elif isinstance(event, Exited):
            self._lines[event.line].exits[event.rank] = event.how
        else:
            self._answered = max(self._answered, event.number)


def _note_process(journal: SegmentHandle, forked: Forked) -> None:
    """Have the rank watched from its birth, and not only from when it has come to its journal."""
    with suppress(PeerDiedError, FrameError), SharedSegment.attach(journal) as segment:  # unless the line was closed
        note_process(segment.buf, forked.pid, forked.start_time)


def _spawn(orders_read: int, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], IO[bytes], int]:
    """Start the fork server; returns it, the end at which its events come out, and its pidfd. Raises OSError."""
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
    try:
        return process, events, os.pidfd_open(process.pid)
    except OSError:
        events.close()
        process.kill()
        process.wait()
        raise
