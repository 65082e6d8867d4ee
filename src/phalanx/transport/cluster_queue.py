"""The control plane over several nodes: one queue whose workers are on the brain's host or anywhere else.

The brain's host has a MessageQueue of its own, if ranks are there; each other node has one link, and on it a ring that
the node's relay owns. A frame is encoded once, written once into the local ring and sent once to each node.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import msgspec

from phalanx.errors import DeadlineError, PhalanxError
from phalanx.transport.codec import Codec
from phalanx.transport.futex import long_spin_s_for, spin_s_for
from phalanx.transport.handshake import VERSION, Refusal
from phalanx.transport.heartbeat import Heartbeat
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import BEATS_PER_TIMEOUT, Hello, Welcome
from phalanx.transport.liveness import Party
from phalanx.transport.node_link import NodeLink
from phalanx.transport.node_listener import JoinedNode, NodeListener
from phalanx.transport.queue import MessageQueue, QueueHandle
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
        command_type: Any,
        reply_type: Any,
        address: str,
        key: RunKey,
        node_timeout_s: float,
        slot_bytes: int,
        num_slots: int,
        name: str,
    ) -> None:
        """Use `create`."""
        assert remote, "without another node a MessageQueue does"
        self._local_ranks = list(local)
        self._remote = {node: tuple(ranks) for node, ranks in remote.items()}
        self._node_timeout_s = node_timeout_s
        self._codec = Codec[C, R](reply_type)
        self._links: dict[int, NodeLink] = {}
        self._in_turn: deque[NodeLink] = deque()
        self._nodes_linked: set[str] = set()
        self._turns: deque[Callable[[], tuple[int, R, list[memoryview]] | None]] = deque([self._poll_links])
        self._is_closed = False
        self._using = threading.RLock()
        welcome = Welcome(f"{name} on {socket.gethostname()}", os.getpid(), node_timeout_s)
        with ExitStack() as undo:
            self._local: MessageQueue[C, R] | None = None
            if local:
                self._local = undo.enter_context(
                    MessageQueue.create(
                        [f"rank {rank}" for rank in local],
                        command_type=command_type,
                        reply_type=reply_type,
                        slot_bytes=slot_bytes,
                        num_slots=num_slots,
                        name=name,
                    )
                )
                self._turns.append(self._poll_local)
            self.bell = SocketBell() if self._local is None else BridgedBell(self._local.bell)
            undo.callback(self.bell.close)
            num_parties = len(local) + 1
            spin = SpinTime(spin_s_for(num_parties) if local else 0.0, long_spin_s_for(num_parties))
            self._waiter = Waiter(self.bell, spin)
            self._listener = NodeListener(address, key, self._why_not, welcome)
            undo.callback(self._listener.close)
            self._heartbeat = Heartbeat(self._beat, node_timeout_s / BEATS_PER_TIMEOUT, "phalanx-heartbeat")
            undo.pop_all()

    @classmethod
    def create(
        cls,
        local: Sequence[int],
        remote: Mapping[str, Sequence[int]],
        *,
        command_type: type[C] | Any,
        reply_type: type[R] | Any,
        address: str,
        key: RunKey,
        node_timeout_s: float = 10.0,
        slot_bytes: int = 64 * 1024,
        num_slots: int = 16,
        name: str = "brain",
    ) -> Self:
        """Make the queue for ranks `local` on this host and, for each node by its name, the ranks there.

        It listens at once on `address` (IPv4 or IPv6, literal or host name, of this host) and no other. Raises
        ConfigError if it cannot; TypeError for a type that msgspec cannot handle.
        """
        msgspec.msgpack.Decoder(command_type)
        return cls(
            local,
            remote,
            command_type=command_type,
            reply_type=reply_type,
            address=address,
            key=key,
            node_timeout_s=node_timeout_s,
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            name=name,
        )

    @property
    def address(self) -> str:
        """The numeric address that it listens on."""
        return self._listener.address

    @property
    def port(self) -> int:
        """The port, which the system picked."""
        return self._listener.port

    @property
    def refusals(self) -> Counter[Refusal]:
        """How many connections were refused so far, and why."""
        return self._listener.refusals.copy()

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
        return tuple(node for node in self._remote if node not in self._nodes_linked)

    def accept(self, *, deadline_s: float) -> None:
        """Block until all nodes have dialled in. Before that nothing can be sent.

        Raises DeadlineError naming those that have not, and their ranks; it can be called again. Raises what `get` does
        for one that dialled in and is gone.
        """
        started = time.monotonic()
        while self.missing():
            remaining_s = started + deadline_s - time.monotonic()
            for joined in self._listener.joined(min(max(remaining_s, 0.0), _LOOK_S)):
                self._link(joined)
            death = self._death()
            if death is not None:
                raise death
            if remaining_s <= 0 and self.missing():
                absent = ", ".join(_described(node, self._remote[node]) for node in self.missing())
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
            for link in self._links.values():
                if link.ranks:
                    link.put(parts, max(expires_at - time.monotonic(), 0.0))
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
            for link in self._links.values():
                if rank in link.ranks:
                    link.forget(rank)

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
            for link in self._links.values():
                link.close()
            if self._local is not None:
                self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _link(self, joined: JoinedNode) -> None:
        node = joined.hello.node
        if node in self._nodes_linked:
            joined.connection.close()  # it dialled twice before anybody looked
            return
        self._nodes_linked.add(node)
        link = NodeLink(joined, self._node_timeout_s)
        self._links[link.fileno()] = link
        self._in_turn.append(link)
        self.bell.add(link.fileno())

    def _why_not(self, hello: Hello) -> str | None:
        """Why a node that has the key is not wanted. Called in the listener's thread."""
        if hello.version != VERSION:
            return f"node {hello.node} has Phalanx {hello.version}, the brain has {VERSION}"
        if self._remote.get(hello.node) != hello.ranks:
            return f"{_described(hello.node, hello.ranks)} is not one of this run's nodes"
        if hello.node in self._nodes_linked:
            return f"node {hello.node} is linked already"
        return None

    def _beat(self) -> None:
        for link in list(self._links.values()):
            link.beat()
        self.bell.ring()  # so that a sleeping `get` judges whether a node is silent

    def _await_space(self, deadline_s: float) -> None:
        """Block until a frame can be sent to everybody."""
        started = time.monotonic()
        self._read_links()
        failure = self._failure_of_links()
        if failure is not None:
            raise failure
        if self._local is not None:
            self._local.await_space(deadline_s=deadline_s)
        if not self._full_links():
            return
        self._waiter.wait_for(
            self._polled_space,
            death=self._death,
            until=lambda: self._is_closed,
            timeout_s=max(started + deadline_s - time.monotonic(), 0.0),
        )
        for link in self._full_links():
            raise link.no_space(time.monotonic() - started)

    def _polled_space(self) -> bool | None:
        self._read_links()
        return None if self._full_links() else True

    def _full_links(self) -> list[NodeLink]:
        return [link for link in self._links.values() if link.ranks and not link.has_space()]

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
        found = self._next_of_links()
        if found is None:
            self._read_links()
            found = self._next_of_links()
        if found is None:
            return None
        link, (rank, parts) = found
        message, buffers = self._codec.decode(parts, link.names[rank])
        return rank, message, buffers

    def _next_of_links(self) -> tuple[NodeLink, tuple[int, list[memoryview]]] | None:
        for _ in range(len(self._in_turn)):
            link = self._in_turn[0]
            self._in_turn.rotate(-1)
            if link.inbox:
                return link, link.inbox.popleft()
        return None

    def _read_links(self) -> None:
        for fd in self.bell.ready():
            link = self._links[fd]
            link.read()
            if link.failure is not None:
                self.bell.remove(fd)

    def _death(self) -> PhalanxError | None:
        """Who has gone. What it sent before has been taken in after this call."""
        self._read_links()
        for link in self._links.values():
            link.judge_silence()
        death = None if self._local is None else self._local.death()
        if death is not None:
            return death
        return self._failure_of_links()

    def _failure_of_links(self) -> PhalanxError | None:
        for link in self._links.values():
            if link.failure is not None and link.ranks:
                return link.failure
            for death in link.deaths.values():
                return death
        return None


def _described(node: str, ranks: Sequence[int]) -> str:
    return f"node {node} ({', '.join(f'rank {rank}' for rank in ranks)})"
