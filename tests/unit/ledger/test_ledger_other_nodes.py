"""What the judge hears of another node, over a real link: its ranks, or that nothing is heard."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from ledger_ranks import WritingRank

from phalanx.errors import StartError
from phalanx.ledger.journal import JOURNAL_BYTES
from phalanx.ledger.other_nodes import OtherNodes, OtherNodesOrder, Silence
from phalanx.ledger.reporting import Judge, ReportOrder, report
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watcher import WatchedRank, Watcher, WatchOrder
from phalanx.transport.address import address_of, listen_on
from phalanx.transport.keys import RunKey
from phalanx.transport.shared_memory import SharedSegment

NODE_TIMEOUT_S = 1.0
SOON_S = 5.0


class Cluster:
    """Rank 0 is the judge's own, rank 1 of node beta, whose watcher is a thread here."""

    def __init__(self, stack: ExitStack) -> None:
        self.key = RunKey.new()
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in range(2)]
        self.ranks = [WritingRank(rank, ["tp@0"], segment.buf) for rank, segment in enumerate(segments)]
        watched = [
            WatchedRank(rank=rank, node=node, groups=("", "tp@0"), journal=segment.handle)
            for rank, (node, segment) in enumerate(zip(["alpha", "beta"], segments, strict=True))
        ]
        listener = listen_on("127.0.0.1")
        _, self.port = address_of(listener)
        others = OtherNodesOrder(
            listener=listener.detach(), key=self.key, ranks={"beta": (1,)}, node_timeout_s=NODE_TIMEOUT_S
        )
        order = WatchOrder(ranks=(watched[0],), groups={"tp@0": (0, 1)}, other_nodes=others)
        self.judge = stack.enter_context(Watcher(order))
        self._stop, self._stopping = os.pipe()
        stack.callback(os.close, self._stop)
        self._report = ReportOrder(
            node="beta",
            watch=WatchOrder(ranks=(watched[1],), groups={}),
            judge=Judge(address="127.0.0.1", port=self.port, key=self.key),
            own_address="127.0.0.1",
            deadline_s=SOON_S,
        )
        self._thread = threading.Thread(target=report, args=(self._report, self._stop))
        self._thread.start()
        stack.callback(self.end_watcher)

    def end_watcher(self) -> None:
        """That of beta."""
        if self._stopping >= 0:
            os.close(self._stopping)
            self._stopping = -1
            self._thread.join()

    def step(self, number: int, *, until: int = 9) -> None:
        for rank in self.ranks:
            rank.begin(number)
            rank.collective("tp@0", "all_reduce")
            if rank.rank == 0 and until == 1:
                rank.issue("tp@0", "all_gather")
                continue
            rank.collective("tp@0", "all_gather")
            rank.end()

    def await_found(self, found: Callable[[], Verdict | None]) -> Verdict:
        expires_at = time.monotonic() + SOON_S
        while time.monotonic() < expires_at:
            if (verdict := found()) is not None:
                return verdict
            time.sleep(0.01)
        raise AssertionError("no verdict")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack)
