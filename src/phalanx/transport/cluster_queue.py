"""The control plane over several nodes: one queue whose workers are on the brain's host or anywhere else.

The brain's host has a MessageQueue of its own, if ranks are there; each other node has one link, and on it a ring that
the node's relay owns. A frame is encoded once, written once into the local ring and sent once to each node.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from phalanx.errors import DeadlineError, PhalanxError
from phalanx.transport.address import listen_on
from phalanx.transport.codec import Codec
from phalanx.transport.futex import long_spin_s_for, spin_s_for
from phalanx.transport.heartbeat import Heartbeat
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import BEATS_PER_TIMEOUT, Welcome
from phalanx.transport.liveness import Party
from phalanx.transport.node_links import NodeLinks
from phalanx.transport.node_listener import NodeListener
from phalanx.transport.queue import BRAIN, DEFAULT_SHAPE, MessageQueue, QueueHandle, QueueShape
from phalanx.transport.socket_bell import BridgedBell, SocketBell
from phalanx.transport.waiter import SpinTime, Waiter

if TYPE_CHECKING:
    from typing_extensions import Buffer

C = TypeVar("C")
R = TypeVar("R")

_LOOK_S = 0.1
"""How often `accept` looks whether the nodes that have come are still there."""


class ClusterQueue(Generic[C, R]):
    """The brain's end. Readers are called by their global ranks. Idle, it wakes a few times in the node's time-out.

    `put`, `get` and `forget` are for one thread; only `close` may come from another. What any node or rank does to the
    queue is as in MessageQueue: PeerDiedError names a rank that died, or a node and its ranks when the node's relay is
    gone; besides, DeadlineError names a node, and its ranks, that gave no sign of life for `node_timeout_s`.
    """

    def __init__(
        self,
        local: Sequence[int],
        remote: Mapping[str, Sequence[int]],
        *,
        command_type: type[C] | Any,
        reply_type: type[R] | Any,
        address: str,
        key: RunKey,
        node_timeout_s: float = 10.0,
        shape: QueueShape = DEFAULT_SHAPE,
    ) -> None:
        """Make the queue for ranks `local` on this host and, for each node by its name, the ranks there.

        It listens at once on `address` (IPv4 or IPv6, literal or host name, of this host) and no other. Raises
        ConfigError if it cannot; TypeError for a type that msgspec cannot handle. `shape` is of the ring on this host.
        """
        assert remote, "without another node a MessageQueue does"
        self._local_ranks = list(local)
        self._codec = Codec[C, R](command_type, reply_type)
        self._turns: deque[Callable[[], tuple[int, R, list[memoryview]] | None]] = deque([self._poll_links])
        self._is_closed = False
        self._using = threading.RLock()
        welcome = Welcome(f"{BRAIN} on {socket.gethostname()}", os.getpid(), node_timeout_s)
        with ExitStack() as undo:
            self._local: MessageQueue[C, R] | None = None
            if local:
                names = [f"rank {rank}" for rank in local]
                queue = MessageQueue[C, R](names, command_type=command_type, reply_type=reply_type, shape=shape)
                self._local = undo.enter_context(queue)
                self._turns.append(self._poll_local)
            self.bell = SocketBell() if self._local is None else BridgedBell(self._local.bell)
            undo.callback(self.bell.close)
            self._waiter = Waiter(self.bell, _spin_time(len(local)))
            self._links = NodeLinks(remote, node_timeout_s, self.bell)
            self._listener = NodeListener(listen_on(address), key, self._links.why_not, welcome)
            undo.callback(self._listener.close)
            self._heartbeat = Heartbeat(self._beat, node_timeout_s / BEATS_PER_TIMEOUT, "phalanx-heartbeat")
            undo.pop_all()

    @property
    def address(self) -> str:
        """The numeric address that it listens on."""
        return self._listener.address

    @property
    def port(self) -> int:
        """The port, which the system picked."""
        return self._listener.port

    def handle(self, rank: int) -> QueueHandle:
        """What a rank on this host attaches with."""
        assert self._local is not None
        return self._local.handle(self._local_ranks.index(rank))

    def expect(self, rank: int, party: Party) -> None:
        """Watch the process that will attach as this rank, which is one on this host."""
        assert self._local is not None
        self._local.expect(self._local_ranks.index(rank), party)

    def missing(self) -> tuple[str, ...]:
        """Nodes that have not dialled in yet."""
        return self._links.missing()

    def accept(self, *, deadline_s: float) -> None:
        """Block until all nodes have dialled in. Before that nothing can be sent.

        Raises DeadlineError naming those that have not, and their ranks; it can be called again. Raises what `get` does
        for one that dialled in and is gone.
        """
        started = time.monotonic()
        while self.missing():
            remaining_s = started + deadline_s - time.monotonic()
            for joined in self._listener.joined(min(max(remaining_s, 0.0), _LOOK_S)):
                self._links.add(joined)
            death = self._death()
            if death is not None:
                raise death
            if remaining_s <= 0 and self.missing():
                absent = self._links.described(self.missing())
                raise DeadlineError("a connection", absent, time.monotonic() - started)

    def put(self, message: C, buffers: Sequence[Buffer] = (), *, deadline_s: float) -> None:
        """Send to all ranks. Blocks only while a rank is `num_slots` frames behind, or the network takes no more.

        Raises DeadlineError naming the slowest rank or the node that the network does not reach, PeerDiedError, each
        time until `forget`. Nothing was sent then, unless a link broke just now: ranks of other nodes may have it.
        """
        with self._using:
            assert not self._is_closed
            assert not self.missing(), "put before accept"
            expires_at = time.monotonic() + deadline_s
            self._await_space(deadline_s)
            parts = self._codec.encode(message, buffers)
            self._links.put(parts, expires_at)
            if self._local is not None:
                self._local.put_frame(parts, deadline_s=0.0)

    def get(
        self, *, timeout_s: float | None, until: Callable[[], bool] | None = None
    ) -> tuple[int, R, list[memoryview]] | None:
        """The next reply: the rank, the message, and its buffers, which are valid until the next `get`.

        As MessageQueue.get: replies of one rank in its order; None after `timeout_s` or as soon as `until()`; a rank's
        death, and now a node's end or silence, after all replies that are there.
        """
        with self._using:
            assert not self._is_closed
            found = self._poll()
            if found is not None:
                return found
            return self._waiter.wait_for(
                self._poll,
                death=self._death,
                until=lambda: self._is_closed or (until is not None and until()),
                timeout_s=timeout_s,
            )

    def forget(self, rank: int) -> None:
        """Go on without this rank: it gets no more commands, its replies are dropped, its end raises no error."""
        with self._using:
            if self._local is not None and rank in self._local_ranks:
                self._local.forget(self._local_ranks.index(rank))
            self._links.forget(rank)

    def close(self) -> None:
        """Let go of all ranks, which get PeerDiedError from now on, of the port and of the memory.

        May be called more than once, and while another thread sleeps in `get`, which then returns None.
        """
        self._is_closed, was_closed = True, self._is_closed
        if was_closed:
            return
        self.bell.ring()
        with self._using:
            self._heartbeat.close()
            self._listener.close()
            self.bell.close()
            self._links.close()
            if self._local is not None:
                self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _beat(self) -> None:
        self._links.beat()
        self.bell.ring()  # so that a sleeping `get` judges whether a node is silent

    def _await_space(self, deadline_s: float) -> None:
        """Block until a frame can be sent to everybody."""
        started = time.monotonic()
        self._links.read()
        failure = self._links.failure()
        if failure is not None:
            raise failure
        if self._local is not None:
            self._local.await_space(deadline_s=deadline_s)
        if not self._links.full():
            return
        self._waiter.wait_for(
            self._polled_space,
            death=self._death,
            until=lambda: self._is_closed,
            timeout_s=max(started + deadline_s - time.monotonic(), 0.0),
        )
        for link in self._links.full():
            raise link.no_space(time.monotonic() - started)

    def _polled_space(self) -> bool | None:
        self._links.read()
        return None if self._links.full() else True

    def _poll(self) -> tuple[int, R, list[memoryview]] | None:
        turns = self._turns
        for _ in range(len(turns)):
            found = turns[0]()
            turns.rotate(-1)
            if found is not None:
                return found
        return None

    def _poll_local(self) -> tuple[int, R, list[memoryview]] | None:
        assert self._local is not None
        found = self._local.poll()
        return None if found is None else (self._local_ranks[found[0]], found[1], found[2])

    def _poll_links(self) -> tuple[int, R, list[memoryview]] | None:
        found = self._links.next()
        if found is None and self._links.read():
            found = self._links.next()
        if found is None:
            return None
        rank, name, parts = found
        message, buffers = self._codec.decode(parts, name)
        return rank, message, buffers

    def _death(self) -> PhalanxError | None:
        """Who has gone. What it sent before has been taken in after this call."""
        self._links.read()
        self._links.judge_silence()
        death = None if self._local is None else self._local.death()
        return death if death is not None else self._links.failure()


def _spin_time(num_local: int) -> SpinTime:
    num_parties = num_local + 1
    return SpinTime(spin_s_for(num_parties) if num_local else 0.0, long_spin_s_for(num_parties))
