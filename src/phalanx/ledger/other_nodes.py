"""The judge's end: what the watchers of all other nodes see, and which of these nodes cannot be heard.

A node whose watcher is silent is lost, unless the run shows that it is there: steps go on, or the run's own link to it
has outlived such a silence. Then it is only unwatched, and nothing is known of its ranks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Self

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.ledger.elsewhere import NodeSeen
from phalanx.ledger.look import RankLook, Unheard
from phalanx.ledger.record import Record
from phalanx.ledger.sighting import (
    AskStacks,
    FromJudge,
    FromNode,
    NodeView,
    Replaced,
    Sighting,
    TellAll,
    with_their_texts,
)
from phalanx.transport.address import inherited_listener
from phalanx.transport.handshake import VERSION
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello, Welcome
from phalanx.transport.message_link import MessageLink
from phalanx.transport.node_listener import JoinedNode, NodeListener

SILENT_S = 3.0
"""A node that is there says something every tenth of a second, also over a network that loses one frame in twenty."""

SHARE_OF_TIMEOUT = 0.5
"""Of the time after which silence ends the run: the finding comes well before that."""

RELINK_S = 1.0
"""For a watcher whose connection has ended to come back, which takes it a tenth of a second."""

OUTLIVED = 1.5
"""Times the silence that ends the run's own link to a node: if the run then goes on, the node is there."""

JOIN_S = 60.0
"""For a node's watcher to come, before it is told that there is none."""

LONGEST_LOOK_S = 0.5
"""From one look to the next. Of a longer pause only so much counts as silence: this process may have been stopped."""

TELL_ALL_S = 1.0
"""For as long a node that was asked to tells whole journals."""

ASK_AGAIN_S = 0.3
STACKS_S = 1.0
_SEND_S = 0.2
_POLL_S = 0.005
_LOST = (PeerDiedError, DeadlineError, FrameError)

log = logging.getLogger("phalanx.ledger")


class OtherNodesOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Which nodes have watchers of their own, and how these are known."""

    listener: int
    """Descriptor of the socket that they dial in at."""
    key: RunKey
    ranks: dict[str, tuple[int, ...]]
    """Of each node."""
    node_timeout_s: float
    """Longer silence ends the run."""
    steps_ahead: int
    """How many steps ranks may begin at most while one of them begins none."""


class OtherNodes:
    """Listens from its construction on; `take` never blocks. For one thread. A context manager."""

    def __init__(self, order: OtherNodesOrder) -> None:
        """Takes over the listening socket."""
        silent_s = min(SILENT_S, order.node_timeout_s * SHARE_OF_TIMEOUT)
        self._timeout_s = order.node_timeout_s
        self._steps_ahead = order.steps_ahead
        self._nodes = {
            name: _Node(name, ranks, silent_s, OUTLIVED * order.node_timeout_s) for name, ranks in order.ranks.items()
        }
        self._asked_at = float("-inf")
        self._listener = NodeListener(
            inherited_listener(order.listener),
            order.key,
            self._why_not,
            Welcome(f"the judge on {os.uname().nodename}", os.getpid(), order.node_timeout_s),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._listener.close)
            for node in self._nodes.values():
                stack.callback(node.close)

    def take(self, now_ns: int, own_steps: Iterable[int] = ()) -> None:
        """Take in what has come until now. `own_steps`: those that ranks beside the judge are in, or were in last."""
        for joined in self._listener.joined(0.0):
            self._nodes[joined.hello.node].join(joined, self._timeout_s)
        for node in self._nodes.values():
            node.take(now_ns)
        newest = max([0, *own_steps, *(step for node in self._heard() for step in node.view.newest_steps())])
        for node in self._nodes.values():
            node.compare(newest, self._steps_ahead)

    def looks(self, most_records: int) -> dict[int, RankLook]:
        """All ranks of the other nodes that have begun, as they were when their nodes were heard last.

        Of nodes that are unwatched there are none.
        """
        return {rank: one for node in self._known() for rank, one in node.view.looks(most_records).items()}

    def steps(self) -> dict[int, tuple[Record, ...]]:
        """The records of steps that these ranks have."""
        return {rank: steps for node in self._known() for rank, steps in node.view.steps().items()}

    def seen(self, most_records: int) -> tuple[NodeSeen, ...]:
        """All of them, to be shown to others."""
        return tuple(node.seen(most_records) for node in self._nodes.values())

    def seen_ns(self, now_ns: int) -> int:
        """When all that `looks` tells of nodes that are heard was so: no rank has been waited for for longer."""
        return min([now_ns, *(node.view.seen_ns for node in self._heard())])

    def have_told_all(self) -> bool:
        """Whether `looks` can give whole journals. If not, the nodes are asked for them."""
        heard = self._heard()
        if time.monotonic() - self._asked_at > ASK_AGAIN_S:
            self._asked_at = time.monotonic()
            for node in heard:
                node.send(TellAll())
        return all(node.view.is_whole for node in heard)

    def unheard(self) -> dict[str, Unheard]:
        """Nodes of which nothing has come for too long, and nothing else shows that they are there."""
        return {name: node.unheard() for name, node in self._nodes.items() if node.is_lost}

    def unwatched(self) -> dict[str, Unheard]:
        """Nodes that are there, as far as one knows, and have no watcher that is heard."""
        return {name: node.unheard() for name, node in self._nodes.items() if node.is_unwatched}

    def stacks(self, ranks: Sequence[int], meanwhile: Callable[[], None]) -> dict[int, tuple[str, ...]]:
        """Where these ranks are, as far as they are on other nodes and their nodes answer.

        `meanwhile` is called while nodes look. Blocks for STACKS_S at most, or as long as `meanwhile` takes.
        """
        expires_at = time.monotonic() + STACKS_S
        asked = [node for node in self._heard() if node.ask_stacks(ranks)]
        meanwhile()
        while any(node.owes_stacks for node in asked) and time.monotonic() < expires_at:
            time.sleep(_POLL_S)
            self.take(time.monotonic_ns())
        return {rank: lines for node in asked for rank, lines in node.stacks.items()}

    @property
    def num_restarts(self) -> int:
        """How often watchers of the other nodes have been replaced, as far as these have said."""
        return sum(node.num_restarts for node in self._nodes.values())

    def _heard(self) -> list[_Node]:
        return [node for node in self._nodes.values() if node.is_heard]

    def _known(self) -> list[_Node]:
        return [node for node in self._nodes.values() if not node.is_unwatched]

    def _why_not(self, hello: Hello) -> str | None:
        """Why a watcher that has the key is not wanted. In the listener's thread."""
        if hello.version != VERSION:
            return f"node {hello.node} has Phalanx {hello.version}, the judge has {VERSION}"
        node = self._nodes.get(hello.node)
        if node is None or node.ranks != hello.ranks:
            return f"node {hello.node} with ranks {hello.ranks} is not one of this run's nodes"
        return None


class Silence:
    """For how long nothing has come, not counting time in which this process was stopped."""

    def __init__(self, now_ns: int) -> None:
        self._silent_ns = 0
        self._looked_ns = now_ns

    def look(self, now_ns: int, *, has_come: bool) -> None:
        """To be called some tens of times a second."""
        passed_ns = min(now_ns - self._looked_ns, int(LONGEST_LOOK_S * 1e9))
        self._silent_ns = 0 if has_come else self._silent_ns + passed_ns
        self._looked_ns = now_ns

    @property
    def seconds(self) -> float:
        return self._silent_ns / 1e9


class _Node:
    """One of the others."""

    def __init__(self, name: str, ranks: tuple[int, ...], silent_s: float, outlived_s: float) -> None:
        self.ranks = ranks
        self.view = NodeView()
        self.owes_stacks = False
        self.stacks: dict[int, tuple[str, ...]] = {}
        self.num_restarts = 0
        """Of its watcher."""
        self._name = name
        self._silent_s = silent_s
        self._outlived_s = outlived_s
        self._silence = Silence(time.monotonic_ns())
        self._link: MessageLink[FromJudge, FromNode] | None = None
        self._end = ""
        """Why there is no link any more."""
        self._has_seen = False
        self._is_new = False
        """Whether nothing has come yet over the link that there is."""
        self._newest_step = 0
        """Of all ranks that were heard, when this node was."""
        self._run_goes_on = False
        self._has_warned = False

    @property
    def is_heard(self) -> bool:
        """Whether what it has told is of now, or of a moment ago."""
        limit_s = min(self._silent_s, RELINK_S) if self._end else self._silent_s
        return self._has_seen and self._silence.seconds < limit_s

    @property
    def is_unwatched(self) -> bool:
        """Whether it is not heard, and there. Of one whose watcher has never come the run's start tells that."""
        if self.is_heard:
            return False
        return not self._has_seen or self._run_goes_on or self._silence.seconds >= self._outlived_s

    @property
    def is_lost(self) -> bool:
        return not self.is_heard and not self.is_unwatched

    def join(self, joined: JoinedNode, timeout_s: float) -> None:
        """Take over the connection of its watcher. One that there is already has ended at the other end."""
        self.close()
        self.owes_stacks, self._is_new = False, True
        self._link = MessageLink(
            joined.connection,
            joined.ciphers,
            f"the watcher of node {self._name}",
            joined.hello.pid,
            timeout_s=timeout_s,
            sent_type=FromJudge,
            received_type=FromNode,
        )

    def take(self, now_ns: int) -> None:
        messages = self._receive()
        for message in messages:
            if isinstance(message, Sighting):
                self._see(message, now_ns)
            elif isinstance(message, Replaced):
                self.num_restarts = message.num_restarts
            else:
                self.stacks, self.owes_stacks = message.of, False
        self._silence.look(now_ns, has_come=bool(messages))

    def compare(self, newest_step: int, steps_ahead: int) -> None:
        """Notice whether the run goes on without word of this node. `newest_step`: of all ranks that are heard."""
        if self.is_heard:
            self._newest_step, self._run_goes_on = newest_step, False
        elif newest_step > self._newest_step + steps_ahead:
            self._run_goes_on = True
        self._tell_of_it()

    def _see(self, sighting: Sighting, now_ns: int) -> None:
        if self._is_new:  # it tells all from the beginning: what was not over when the last link ended may be now
            self.view, self._is_new, self._end = NodeView(), False, ""
        self.view.take(sighting, now_ns)
        self._has_seen = True

    def _tell_of_it(self) -> None:
        """Once, and that it is over."""
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        if self.is_heard and self._has_warned:
            log.info("node %s (%s) is watched again", self._name, ranks)
            self._has_warned = False
        elif self.is_unwatched and not self._has_warned and (self._has_seen or self._silence.seconds >= JOIN_S):
            why = self.unheard().why
            log.warning("node %s (%s) is not watched: %s; the run goes on without that", self._name, ranks, why)
            self._has_warned = True

    def send(self, message: FromJudge) -> bool:
        """Unless the network takes nothing now."""
        if self._link is None or not self._link.can_send():
            return False
        try:
            self._link.send(message, deadline_s=_SEND_S)
        except _LOST as error:
            self._lose(error)
            return False
        return True

    def ask_stacks(self, ranks: Sequence[int]) -> bool:
        """Whether any of the ranks is there, and was asked for its stack."""
        here = tuple(rank for rank in ranks if rank in self.ranks)
        self.owes_stacks = bool(here) and self.send(AskStacks(here))
        return self.owes_stacks

    def unheard(self) -> Unheard:
        """For how long, and why."""
        silent_s = self._silence.seconds
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - silent_s))
        if not self._has_seen:
            why = f"its watcher has not come, since {since}"
        elif self._end:
            why = f"nothing comes from its watcher since {since}: {self._end}"
        else:
            why = f"nothing has come from its watcher since {since}, for {silent_s:.1f} s"
        return Unheard(self.ranks, silent_s, why)

    def seen(self, most_records: int) -> NodeSeen:
        """Texts are those of the records alone, which bounds them."""
        looks = [] if self.is_unwatched else self.view.looks(most_records).values()
        return NodeSeen(
            node=self._name,
            ranks=self.ranks,
            word="unwatched" if self.is_unwatched else "lost" if self.is_lost else "heard",
            seen_ns=self.view.seen_ns if self._has_seen else 0,
            looks=tuple(with_their_texts(one) for one in looks),
        )

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _receive(self) -> list[FromNode]:
        if self._link is None:
            return []
        try:
            return self._link.receive()
        except _LOST as error:
            self._lose(error)
            return []

    def _lose(self, error: PeerDiedError | DeadlineError | FrameError) -> None:
        self._end = error.detail if isinstance(error, PeerDiedError) else str(error)
        self.owes_stacks = False
        self.close()
