"""The brain's links to all other nodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from phalanx.errors import PhalanxError
from phalanx.transport.frame import Part
from phalanx.transport.handshake import VERSION
from phalanx.transport.link_messages import Hello
from phalanx.transport.node_link import NodeLink
from phalanx.transport.node_listener import JoinedNode
from phalanx.transport.socket_bell import BridgedBell, SocketBell


class NodeLinks:
    """One for each node that has dialled in. All but `why_not` and `beat` is for one thread; only `put` blocks."""

    def __init__(
        self, expected: Mapping[str, Sequence[int]], node_timeout_s: float, bell: SocketBell | BridgedBell
    ) -> None:
        """The nodes that are to come, by name, each with its ranks. `bell` rings when one of them says something."""
        self._expected = {node: tuple(ranks) for node, ranks in expected.items()}
        self._node_timeout_s = node_timeout_s
        self._bell = bell
        self._links: dict[int, NodeLink] = {}
        self._in_turn: deque[NodeLink] = deque()
        self._linked: set[str] = set()

    def why_not(self, hello: Hello) -> str | None:
        """Why a node that has the key is not wanted. From any thread."""
        if hello.version != VERSION:
            return f"node {hello.node} has Phalanx {hello.version}, the brain has {VERSION}"
        if self._expected.get(hello.node) != hello.ranks:
            return f"{_described(hello.node, hello.ranks)} is not one of this run's nodes"
        if hello.node in self._linked:
            return f"node {hello.node} is linked already"
        return None

    def missing(self) -> tuple[str, ...]:
        """Nodes that have not dialled in yet."""
        return tuple(node for node in self._expected if node not in self._linked)

    def described(self, nodes: Sequence[str]) -> str:
        """Their names and ranks."""
        return ", ".join(_described(node, self._expected[node]) for node in nodes)

    def add(self, joined: JoinedNode) -> None:
        """Take over the connection of a node that has dialled in."""
        node = joined.hello.node
        if node in self._linked:
            joined.connection.close()  # it dialled twice before anybody looked
            return
        self._linked.add(node)
        link = NodeLink(joined, self._node_timeout_s)
        self._links[link.fileno()] = link
        self._in_turn.append(link)
        self._bell.add(link.fileno())

    def beat(self) -> None:
        """Tell every node that the brain is there; from any thread."""
        for link in list(self._links.values()):
            link.beat()

    def full(self) -> list[NodeLink]:
        """Those to which no frame can be sent now."""
        return [link for link in self._links.values() if link.ranks and not link.has_space()]

    def put(self, parts: Sequence[Part], expires_at: float) -> None:
        """Send to every node that has ranks left; none is full. Raises as `NodeLink.put`."""
        for link in self._links.values():
            if link.ranks:
                link.put(parts, max(expires_at - time.monotonic(), 0.0))

    def read(self) -> bool:
        """Take in what has come, from whomever; False if nothing has.

        What that means shows in `next`, `full` and `failure`.
        """
        ready = self._bell.ready()
        for fd in ready:
            link = self._links[fd]
            link.read()
            if link.failure is not None:
                self._bell.remove(fd)
        return bool(ready)

    def next(self) -> tuple[int, str, list[memoryview]] | None:
        """A reply that has come: the rank, what it is called, and the frame. Nodes take turns."""
        for _ in range(len(self._in_turn)):
            link = self._in_turn[0]
            self._in_turn.rotate(-1)
            if link.inbox:
                rank, parts = link.inbox.popleft()
                return rank, link.names[rank], parts
        return None

    def failure(self) -> PhalanxError | None:
        """The end of a link or of a rank, none of which is forgotten, as far as `read` has heard of it."""
        for link in self._links.values():
            if link.failure is not None and link.ranks:
                return link.failure
            for death in link.deaths.values():
                return death
        return None

    def judge_silence(self) -> None:
        """End links from which nothing came for too long. When `read` has just been called."""
        for link in self._links.values():
            link.judge_silence()

    def forget(self, rank: int) -> None:
        """Go on without this rank, wherever it is."""
        for link in self._links.values():
            if rank in link.ranks:
                link.forget(rank)

    def close(self) -> None:
        """Say goodbye to every node."""
        for link in self._links.values():
            link.close()


def _described(node: str, ranks: Sequence[int]) -> str:
    return f"node {node} ({', '.join(f'rank {rank}' for rank in ranks)})"
