"""Relays, ranks and brains that are killed or stopped, and others that would like to have a say."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from shared_memory_names import no_new_names
from transport_channels import DEADLINE_S, FORK, Channel, echo, open_channel
from transport_messages import Tick

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.handshake import Refusal
from phalanx.transport.keys import RunKey
from phalanx.transport.queue import WorkerEndpoint
from phalanx.transport.relay import NodeRelay

SOON_S = 0.5  # milliseconds, on a machine that has other things to do
LAYOUTS = ["relay", "shared memory and relay"]


class Run:
    """A channel to two ranks that answer; the second is on another node, in every layout."""

    def __init__(self, channel: Channel, ranks: Sequence[Any]) -> None:
        self.queue = channel.queue
        self.relay = channel.relays[0]
        self.ranks = ranks

    def tick(self, number: int = 0, buffers: Sequence[bytes] = ()) -> None:
        """One round trip."""
        self.queue.put(Tick(number), buffers, deadline_s=10)
        answered = []
        for _ in self.ranks:
            found = self.queue.get(timeout_s=10)
            assert found is not None
            assert found[1] == Tick(number)
            assert [bytes(buffer) for buffer in found[2]] == list(buffers)
            answered.append(found[0])
        assert sorted(answered) == list(range(len(self.ranks)))


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts runs, and ends what is left of them."""
    with no_new_names(), ExitStack() as stack:

        def started(layout: str, **options: Any) -> Run:
            channel = stack.enter_context(open_channel(layout, 2, Tick, Tick, **options))
            for relay in channel.relays:
                stack.callback(relay.kill)
            ranks = [FORK.Process(target=echo, args=(channel.handles[rank],)) for rank in range(2)]
            for rank in ranks:
                rank.start()
                stack.callback(rank.join, 10)
                stack.callback(rank.kill)
            run = Run(channel, ranks)
            run.tick()
            return run

        yield started


def _later(delay_s: float, act: Callable[..., Any], *arguments: Any) -> tuple[threading.Timer, list[float]]:
    times: list[float] = []

    def run() -> None:
        times.append(time.monotonic())
        act(*arguments)

    timer = threading.Timer(delay_s, run)
    timer.start()
    return timer, times


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_of_another_node_is_named_at_once(start: Callable[..., Run], layout: str) -> None:
    run = start(layout)
    timer, killed = _later(0.1, run.ranks[1].kill)
    with pytest.raises(PeerDiedError, match=rf"rank 1 \(pid {run.ranks[1].pid}\) died: on node node-b"):
        run.queue.get(timeout_s=30)
    assert time.monotonic() - killed[0] < SOON_S
    timer.join()
    with pytest.raises(PeerDiedError, match="rank 1"):
        run.queue.put(Tick(), deadline_s=1)
    run.queue.forget(1)
    run.queue.put(Tick(8), deadline_s=1)
    assert run.queue.get(timeout_s=10) == (0, Tick(8), [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_relay_is_named_with_its_ranks_which_end_too(start: Callable[..., Run], layout: str) -> None:
    run = start(layout)
    timer, killed = _later(0.1, run.relay.kill)
    with pytest.raises(PeerDiedError, match=rf"node node-b \(.*rank 1\) \(pid {run.relay.pid}\)"):
        run.queue.get(timeout_s=30)
    assert time.monotonic() - killed[0] < SOON_S
    timer.join()
    run.ranks[1].join(5)
    assert run.ranks[1].exitcode == 0


def test_a_relay_killed_in_the_middle_of_a_large_frame(start: Callable[..., Run]) -> None:
    run = start("relay")
    timer, _ = _later(0.02, run.relay.kill)
    with pytest.raises(PeerDiedError, match="node-b"):
        for number in range(1000):
            run.tick(number, [bytes(20_000_000)])
    timer.join()


def _brain(pipe: Any, node_timeout_s: float) -> None:
    """A brain in a process: it talks with its ranks for ever, and says how far it is."""
    key = RunKey.new()
    types = {"command_type": Tick, "reply_type": Tick}
    queue: ClusterQueue[Tick, Tick] = ClusterQueue(
        [], {"node-b": [0]}, address="127.0.0.1", key=key, node_timeout_s=node_timeout_s, **types
    )
    with queue:
        pipe.send((queue.address, queue.port, key))
        queue.accept(deadline_s=DEADLINE_S)
        for number in range(10**9):
            queue.put(Tick(number), deadline_s=10)
            assert queue.get(timeout_s=10) is not None
            pipe.send(number)


def _node(address: str, port: int, key: RunKey) -> None:
    relay = NodeRelay("node-b", [0])
    rank = FORK.Process(target=echo, args=(relay.handle(0),))
    rank.start()
    relay.dial(address, port, key, deadline_s=DEADLINE_S)
    try:
        relay.run()
    finally:
        rank.join()


class BrainApart:
    """A run whose brain is a process of its own."""

    def __init__(self, stack: ExitStack, node_timeout_s: float = 10.0) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.brain = FORK.Process(target=_brain, args=(theirs, node_timeout_s))
        self.brain.start()
        stack.callback(self.brain.kill)
        theirs.close()
        address, port, key = self.pipe.recv()
        self.node = FORK.Process(target=_node, args=(address, port, key))
        self.node.start()
        stack.callback(self.node.kill)
        assert self.pipe.recv() == 0

    def signal_all(self, number: signal.Signals) -> None:
        for process in (self.brain, self.node):
            os.kill(process.pid, number)

    def ticks(self) -> int:
        """How many round trips there were since the last call."""
        count = 0
        while self.pipe.poll():
            self.pipe.recv()
            count += 1
        return count


def test_a_killed_brain_ends_its_nodes_and_their_ranks() -> None:
    with ExitStack() as stack:
        run = BrainApart(stack)
        run.brain.kill()
        killed_at = time.monotonic()
        run.node.join(10)
        assert time.monotonic() - killed_at < SOON_S
        assert run.node.exitcode == 1  # it ends with the error that says so, after its rank


def test_all_of_a_run_may_be_stopped_for_longer_than_the_time_out() -> None:
    with ExitStack() as stack:
        run = BrainApart(stack, node_timeout_s=0.5)
        run.signal_all(signal.SIGSTOP)
        time.sleep(1.5)
        run.ticks()
        run.signal_all(signal.SIGCONT)
        time.sleep(0.5)
        assert run.ticks() > 10
        assert run.node.is_alive()


def test_a_relay_that_is_stopped_for_a_moment_is_waited_for(start: Callable[..., Run]) -> None:
    run = start("shared memory and relay", node_timeout_s=3.0)
    os.kill(run.relay.pid, signal.SIGSTOP)
    timer, _ = _later(1.0, os.kill, run.relay.pid, signal.SIGCONT)
    started = time.monotonic()
    run.tick(5, [b"x" * 1_000_000])
    assert time.monotonic() - started > 0.8
    timer.join()


def test_a_relay_that_is_stopped_for_good_is_a_deadline_that_names_node_and_ranks(start: Callable[..., Run]) -> None:
    run = start("shared memory and relay", node_timeout_s=1.0)
    os.kill(run.relay.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"a sign of life from node node-b \(rank 1\)"):
        run.queue.get(timeout_s=30)
    assert 0.9 < time.monotonic() - started < 1.8
    run.queue.close()
    os.kill(run.relay.pid, signal.SIGCONT)
    run.ranks[1].join(5)
    assert run.ranks[1].exitcode == 0


def test_a_node_that_the_network_takes_nothing_for_is_a_deadline(start: Callable[..., Run]) -> None:
    run = start("relay", node_timeout_s=2.0)
    os.kill(run.relay.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"from node node-b \(rank 0, rank 1\)"):
        for _ in range(10):
            run.queue.put(Tick(), [bytes(30_000_000)], deadline_s=1.0)
    assert time.monotonic() - started < 2.5


# ------------------------------------------------------------------ strangers


class Proxy:
    """Between a relay and its brain: keeps what the relay says, and lets a test lay hands on what the brain says."""

    def __init__(self, address: str, port: int, tamper: Callable[[bytes], bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.recorded = b""
        self._tamper = tamper
        self._sockets = [self._listener]
        self.threads = [threading.Thread(target=self._accept, args=(address, port))]
        self.threads[0].start()

    def _accept(self, address: str, port: int) -> None:
        node, _ = self._listener.accept()
        brain = socket.create_connection((address, port))
        self._sockets += [node, brain]
        back = threading.Thread(target=self._pump, args=(node, brain, self._record))
        self.threads.append(back)
        back.start()
        self._pump(brain, node, self._tamper)

    def _record(self, data: bytes) -> bytes:
        self.recorded += data
        return data

    def _pump(self, source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(change(data))
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self.threads:
            thread.join(10)


class TamperedRun:
    """A run whose only node dials in through a proxy. Brain, relay and rank are in this process."""

    def __init__(self, stack: ExitStack, tamper: Callable[[bytes], bytes]) -> None:
        key = RunKey.new()
        self.queue: ClusterQueue[Tick, Tick] = ClusterQueue(
            [], {"node-b": [0]}, command_type=Tick, reply_type=Tick, address="127.0.0.1", key=key, node_timeout_s=2.0
        )
        stack.callback(self.queue.close)
        self.proxy = Proxy(self.queue.address, self.queue.port, tamper)
        stack.callback(self.proxy.close)
        self.relay = NodeRelay("node-b", [0])
        stack.callback(self.relay.close)
        self.relay.dial("127.0.0.1", self.proxy.port, key, deadline_s=10)
        self.queue.accept(deadline_s=10)
        self.ended_with: list[Exception] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        stack.callback(self.thread.join, 10)
        self.rank: WorkerEndpoint[Tick, Tick] = WorkerEndpoint.attach(
            self.relay.handle(0), command_type=Tick, reply_type=Tick
        )
        stack.callback(self.rank.close)

    def _run(self) -> None:
        try:
            self.relay.run()
        except (FrameError, DeadlineError) as error:
            self.ended_with.append(error)

    def tick(self, number: int) -> None:
        self.queue.put(Tick(number), deadline_s=5)
        assert self.rank.get(timeout_s=5) == (Tick(number), [])
        self.rank.put(Tick(number), deadline_s=5)
        assert self.queue.get(timeout_s=5) == (0, Tick(number), [])


TAMPERINGS: dict[str, Callable[[bytes], bytes]] = {
    "a bit is flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "said twice": lambda data: data + data,
    "cut short": lambda data: data[:-1],
    "something in between": lambda data: b"\0\0\0\40" + bytes(32) + data,
    "two in the wrong order": lambda data: data[len(data) // 2 :] + data[: len(data) // 2],
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_what_is_changed_on_the_way_never_reaches_a_rank(how: str) -> None:
    changes: list[Callable[[bytes], bytes]] = []
    with ExitStack() as stack:
        run = TamperedRun(stack, lambda data: changes[0](data) if changes else data)
        for number in range(5):
            run.tick(number)
        changes.append(TAMPERINGS[how])
        received = []
        with suppress(PeerDiedError):
            for number in (6, 7):  # the second one shows that something is missing in the first
                run.queue.put(Tick(number), deadline_s=5)
            while (found := run.rank.get(timeout_s=5)) is not None:
                received.append(found[0])
        assert received in ([], [Tick(6)], [Tick(6), Tick(7)])
        run.thread.join(10)
        # A length that was changed may promise more than ever comes, or more than a message can have.
        seen = r"did not encrypt|a sign of life from brain|a message of \d+ bytes between nodes"
        assert re.search(seen, str(run.ended_with[0]))
        said = rf"node node-b \(rank 0\).*(closed|reset|{seen})"
        with pytest.raises(PeerDiedError, match=said):
            run.queue.get(timeout_s=5)


def _attack(queue: ClusterQueue[Tick, Tick], recorded: bytes, until: threading.Event) -> None:
    """All that a stranger can do who reaches the port and has recorded a node, but does not have the key."""
    said = [
        recorded,
        recorded[:-1] + b"\0",
        b"",
        b"GET / HTTP/1.1\r\n\r\n" * 100,
        b"\0\60" + bytes(48),
        b"\xff" * 70_000,
        b"\0",
    ]
    with ExitStack() as open_connections:
        for number in range(10**9):
            if until.is_set():
                return
            with suppress(OSError):
                stranger = socket.create_connection((queue.address, queue.port), timeout=1)
                open_connections.callback(stranger.close)
                stranger.sendall(said[number % len(said)])
            if number % 100 == 99:
                open_connections.close()


def test_strangers_have_no_effect_on_a_run_under_way(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        run = TamperedRun(stack, lambda data: data)
        until = threading.Event()
        attackers = [threading.Thread(target=_attack, args=(run.queue, run.proxy.recorded, until)) for _ in range(2)]
        for attacker in attackers:
            attacker.start()
        stack.callback(until.set)
        refusals = run.queue._listener.refusals
        awaited = {Refusal.REPLAYED, Refusal.WRONG_KEY, Refusal.OVERSIZE, Refusal.CROWDED}
        longest_s = 0.0
        began_at = time.monotonic()
        number = 0
        while time.monotonic() < began_at + 1 or (not awaited <= set(refusals) and time.monotonic() < began_at + 20):
            started = time.monotonic()
            run.tick(number)
            longest_s = max(longest_s, time.monotonic() - started)
            number += 1
        until.set()
        for attacker in attackers:
            attacker.join(10)
        assert awaited <= set(refusals)
        assert Refusal.UNEXPECTED not in refusals
        assert number > 200
        assert longest_s < 1
        assert len(caplog.records) == len(refusals)
        run.queue.close()  # ends the relay, whose thread is awaited
