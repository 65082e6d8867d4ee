"""The end of a node beside the brain's: its watcher does not judge, but tells the judge what it sees."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import msgspec

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.ledger.endings import Endings
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.other_nodes import TELL_ALL_S
from phalanx.ledger.redialling import Redialling
from phalanx.ledger.sighting import FromJudge, FromNode, Replaced, Stacks, TellAll, Telling
from phalanx.ledger.watch_order import WatchOrder
from phalanx.ledger.watched import GLANCE_RECORDS
from phalanx.ledger.watcher import LEARN_S, Watcher
from phalanx.transport.dialling import dial
from phalanx.transport.handshake import VERSION
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello, Welcome
from phalanx.transport.message_link import MessageLink

BEAT_S = 0.1
"""A sign of life at least this often."""

ATTEMPT_S = 3.0
"""For the judge to answer, before it is dialled anew: a network that is there again is then found soon."""

SEND_S = 10.0
"""For the network to take a message at most, however patient the nodes' own links are: who waits does not beat."""


class Judge(msgspec.Struct, frozen=True, kw_only=True):
    """Where the judge listens."""

    address: str
    port: int
    key: RunKey


class ReportOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Which ranks a node's watcher is to watch, and whom it tells."""

    node: str
    watch: WatchOrder
    judge: Judge
    own_address: str
    """Of this host, to dial from."""


def report(order: ReportOrder, stop: int, beat: Callable[[], None] = lambda: None) -> None:
    """Tell the judge what there is to see; returns when `stop` closes. Calls `beat` before each look.

    The judge is dialled until it answers, and again whenever the link to it breaks: each time both ends agree on new
    keys, and all is told anew, since what was on its way is lost.
    """
    with ExitStack() as stack:
        watcher, endings = stack.enter_context(Watcher(order.watch)), stack.enter_context(Endings())
        judge = stack.enter_context(Redialling(partial(_link, order), "the judge of this run"))
        reporter: _Reporter | None = None
        while not endings.wait(stop, watcher.pids()):
            beat()
            link = judge.link()
            if link is None:
                continue
            if reporter is None or reporter.link is not link:
                reporter = _Reporter(link, watcher, order.watch.num_restarts, stop)
            try:
                reporter.turn()
            except (PeerDiedError, DeadlineError, FrameError) as error:
                judge.lose(error)


def _link(order: ReportOrder) -> MessageLink[FromNode, FromJudge]:
    ranks = tuple(one.rank for one in order.watch.ranks)
    connection, ciphers = dial(
        order.judge.address,
        order.judge.port,
        order.judge.key,
        Hello(VERSION, order.node, ranks, os.getpid(), 0),
        party=f"the watcher of node {order.node}",
        deadline_s=ATTEMPT_S,
        source_address=order.own_address,
    )
    judge = ciphers.peer
    assert isinstance(judge, Welcome)
    return MessageLink(
        connection,
        ciphers,
        judge.brain,
        judge.pid,
        timeout_s=judge.node_timeout_s,
        sent_type=FromNode,
        received_type=FromJudge,
    )


class _Reporter:
    """Looks, tells and answers over one link, which it knows to have told nothing yet."""

    def __init__(self, link: MessageLink[FromNode, FromJudge], watcher: Watcher, num_restarts: int, stop: int) -> None:
        self.link = link
        self._watcher = watcher
        self._untold_restarts = num_restarts
        self._stop = stop
        self._telling = Telling()
        self._tell_all_until = self._beat_at = self._steps_at = float("-inf")

    def turn(self) -> None:
        """Raises what the link raises."""
        for message in self.link.receive():
            self._answer(message)
        if self._untold_restarts and self.link.can_send():
            self._send(Replaced(self._untold_restarts))
            self._untold_restarts = 0
        # What is not told now is told with the next sighting. Beats that the network still takes, and nobody
        # acknowledges, would arrive one after the other, and the silence would begin with the last of them.
        if self.link.can_send() and self.link.has_arrived():
            self._tell()

    def _answer(self, message: FromJudge) -> None:
        if isinstance(message, TellAll):
            self._tell_all_until = time.monotonic() + TELL_ALL_S
        else:
            self._send(Stacks(self._watcher.stacks(message.ranks)))

    def _tell(self) -> None:
        now = time.monotonic()
        is_whole = now < self._tell_all_until
        look = self._watcher.look(time.monotonic_ns(), NUM_RECORDS if is_whole else GLANCE_RECORDS)
        steps = None
        if now >= self._steps_at:  # from which the judge learns how long steps take
            self._steps_at, steps = now + LEARN_S, self._watcher.steps()
        sighting = self._telling.sighting(look.now_ns, look.ranks, is_whole=is_whole, also=steps)
        if sighting.ranks or now >= self._beat_at:
            self._send(sighting)
            self._beat_at = now + BEAT_S

    def _send(self, message: FromNode) -> None:
        self.link.send(message, deadline_s=min(self.link.timeout_s, SEND_S), stop=self._stop)
