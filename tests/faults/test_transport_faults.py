"""Processes that die, stop or never come: the queue says so within milliseconds, and says who."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest
from shared_memory_names import no_new_names
from transport_messages import Tick

from phalanx.errors import DeadlineError, PeerDiedError
from phalanx.transport.liveness import Party
from phalanx.transport.queue import MessageQueue, QueueHandle, QueueShape, WorkerEndpoint
from phalanx.transport.stream import Stream, stream_pair

FORK = multiprocessing.get_context("fork")
SOON_S = 0.5  # milliseconds, on a machine that has other things to do


Queue = MessageQueue[Tick, Tick]
Endpoint = WorkerEndpoint[Tick, Tick]


def _create(num_readers: int) -> Queue:
    names = [f"rank {r}" for r in range(num_readers)]
    return MessageQueue(names, command_type=Tick, reply_type=Tick, shape=QueueShape(num_slots=2))


def _attach(handle: QueueHandle) -> Endpoint:
    return WorkerEndpoint.attach(handle, command_type=Tick, reply_type=Tick)


@pytest.fixture
def spawn() -> Iterator[Callable[..., int]]:
    """Starts a function in a process, and kills what is left of it in the end."""
    with no_new_names(), ExitStack() as stack:

        def start(target: Callable[..., None], *arguments: Any) -> int:
            process = FORK.Process(target=target, args=arguments)
            process.start()
            stack.callback(process.join, 10)
            stack.callback(process.kill)
            assert process.pid is not None
            return process.pid

        yield start


def _echo(handle: QueueHandle) -> None:
    with _attach(handle) as endpoint:
        while (found := endpoint.get(timeout_s=60)) is not None:
            endpoint.put(found[0], deadline_s=60)


def _say_hello_and_sleep(handle: QueueHandle) -> None:
    with _attach(handle) as endpoint:
        endpoint.put(Tick(), deadline_s=60)
        time.sleep(60)


def _killed_soon(pid: int, how: signal.Signals = signal.SIGKILL) -> tuple[threading.Timer, list[float]]:
    times: list[float] = []

    def kill() -> None:
        times.append(time.monotonic())
        os.kill(pid, how)

    timer = threading.Timer(0.1, kill)
    timer.start()
    return timer, times


def test_a_reader_is_killed_while_the_writer_waits_for_space(spawn: Callable[..., int]) -> None:
    with _create(2) as queue:
        pids = [spawn(_say_hello_and_sleep, queue.handle(r)) for r in range(2)]
        for _ in pids:
            assert queue.get(timeout_s=10) is not None
        for _ in range(2):
            queue.put(Tick(), deadline_s=1)
        timer, killed = _killed_soon(pids[1])
        with pytest.raises(PeerDiedError, match=rf"rank 1 \(pid {pids[1]}\)"):
            queue.put(Tick(), deadline_s=30)
        assert time.monotonic() - killed[0] < SOON_S
        timer.join()
        queue.forget(1)
        with pytest.raises(DeadlineError, match="rank 0"):
            queue.put(Tick(), deadline_s=0.05)


def test_a_worker_is_killed_while_the_brain_waits_for_its_reply(spawn: Callable[..., int]) -> None:
    with _create(2) as queue:
        pids = [spawn(_say_hello_and_sleep, queue.handle(0)), spawn(_echo, queue.handle(1))]
        queue.put(Tick(5), deadline_s=1)
        replies = [queue.get(timeout_s=10) for _ in range(2)]
        assert sorted(reply[0] for reply in replies if reply) == [0, 1]
        timer, killed = _killed_soon(pids[0])
        with pytest.raises(PeerDiedError, match=f"rank 0 .pid {pids[0]}"):
            queue.get(timeout_s=30)
        assert time.monotonic() - killed[0] < SOON_S
        timer.join()
        queue.forget(0)
        queue.put(Tick(6), deadline_s=1)
        assert queue.get(timeout_s=10) == (1, Tick(6), [])


def test_replies_of_a_killed_worker_are_read_before_its_death(spawn: Callable[..., int]) -> None:
    with _create(1) as queue:
        pid = spawn(_echo, queue.handle(0))
        queue.put(Tick(1), deadline_s=1)
        queue.put(Tick(2), deadline_s=1)
        assert queue.get(timeout_s=10) == (0, Tick(1), [])
        replies = queue._replies[0]
        _wait_until(lambda: replies._words[replies._seats.sequence_words[1]] == 2)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert queue.get(timeout_s=10) == (0, Tick(2), [])
        with pytest.raises(PeerDiedError, match="rank 0"):
            queue.get(timeout_s=10)


def test_a_stopped_reader_is_not_dead_but_a_deadline(spawn: Callable[..., int]) -> None:
    with _create(1) as queue:
        pid = spawn(_echo, queue.handle(0))
        queue.put(Tick(1), deadline_s=1)
        assert queue.get(timeout_s=10) is not None
        os.kill(pid, signal.SIGSTOP)
        num_sent = 0
        with pytest.raises(DeadlineError, match=rf"rank 0 \(pid {pid}\)"):
            while num_sent < 3:  # two slots, of which it may still hold one: it was stopped wherever it was
                queue.put(Tick(num_sent), deadline_s=0.2)
                num_sent += 1
        os.kill(pid, signal.SIGCONT)
        assert [queue.get(timeout_s=10) for _ in range(num_sent)] == [(0, Tick(n), []) for n in range(num_sent)]


def _run_brain(pipe: Connection) -> None:
    with _create(1) as queue:
        pipe.send_bytes(msgspec.msgpack.encode(queue.handle(0)))
        queue.put(Tick(7), deadline_s=1)
        time.sleep(60)


def test_a_killed_brain_wakes_its_worker_after_the_last_command(spawn: Callable[..., int]) -> None:
    ours, theirs = FORK.Pipe()
    pid = spawn(_run_brain, theirs)
    handle = msgspec.msgpack.decode(ours.recv_bytes(), type=QueueHandle)
    with _attach(handle) as endpoint:
        assert endpoint.get(timeout_s=10) == (Tick(7), [])
        timer, killed = _killed_soon(pid)
        with pytest.raises(PeerDiedError, match=rf"brain \(pid {pid}\)"):
            endpoint.get(timeout_s=30)
        assert time.monotonic() - killed[0] < SOON_S
        timer.join()
    with pytest.raises(PeerDiedError, match="queue of brain"):
        _attach(handle)


def test_a_worker_that_never_came_is_a_deadline_that_says_so() -> None:
    with _create(1) as queue:
        for _ in range(2):
            queue.put(Tick(), deadline_s=1)
        with pytest.raises(DeadlineError, match="never attached"):
            queue.put(Tick(), deadline_s=0.05)
        assert queue.get(timeout_s=0.05) is None


def test_a_worker_that_dies_before_it_attaches(spawn: Callable[..., int]) -> None:
    with _create(1) as queue:
        pid = spawn(time.sleep, 60)
        queue.expect(0, Party.of("rank 0", pid))
        timer, killed = _killed_soon(pid)
        with pytest.raises(PeerDiedError, match="rank 0"):
            queue.get(timeout_s=30)
        assert time.monotonic() - killed[0] < SOON_S
        timer.join()


@pytest.mark.slow
def test_workers_killed_at_random_moments_of_a_conversation(spawn: Callable[..., int]) -> None:
    for attempt in range(20):
        with _create(2) as queue:
            pids = [spawn(_echo, queue.handle(r)) for r in range(2)]
            for r, pid in enumerate(pids):  # one may be killed before it has attached
                queue.expect(r, Party.of(f"rank {r}", pid))
            victim = attempt % 2
            timer = threading.Timer(0.02 + 0.001 * attempt, os.kill, (pids[victim], signal.SIGKILL))
            timer.start()
            started = time.monotonic()
            with pytest.raises(PeerDiedError, match=f"rank {victim}"):
                while time.monotonic() - started < 30:
                    queue.put(Tick(), deadline_s=30)
                    for _ in range(2):
                        queue.get(timeout_s=30)
            assert time.monotonic() - started < 1
            timer.join()


def _hold_stream(fd: int) -> None:
    with Stream(fd, Party.me("server")) as stream:
        stream.wait(60)


def test_a_killed_server_wakes_a_brain_that_waits_for_workers(spawn: Callable[..., int]) -> None:
    ours, theirs = stream_pair()
    pid = spawn(_hold_stream, theirs)
    os.close(theirs)
    server = Party.of("server", pid)
    with _create(1) as queue, Stream(ours, server, bell=queue.bell) as stream:
        timer, killed = _killed_soon(pid)
        assert queue.get(timeout_s=30, until=stream.is_readable) is None
        assert time.monotonic() - killed[0] < SOON_S
        with pytest.raises(PeerDiedError, match="server"):
            stream.poll()
        timer.join()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
