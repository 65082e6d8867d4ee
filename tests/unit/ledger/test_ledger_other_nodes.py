"""What the judge hears of another node, over a real link: its ranks, or that nothing is heard."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from ledger_ranks import WritingRank

from phalanx.errors import StartError
from phalanx.ledger import other_nodes
from phalanx.ledger.journal import JOURNAL_BYTES, NUM_RECORDS
from phalanx.ledger.other_nodes import SHARE_OF_TIMEOUT, OtherNodesOrder, Silence
from phalanx.ledger.reporting import Judge, ReportOrder, report
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watcher import WatchedRank, Watcher, WatchOrder
from phalanx.transport import dialling
from phalanx.transport.address import address_of, listen_on
from phalanx.transport.handshake import VERSION
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello
from phalanx.transport.message_link import MessageLink
from phalanx.transport.shared_memory import SharedSegment

SILENT_S = 0.5
NEVER_S = 3600.0
DEADLINE_S = 60.0


class Cluster:
    """Rank 0 is the judge's own, rank 1 of node beta, whose watcher is a thread here."""

    def __init__(self, stack: ExitStack, silent_s: float) -> None:
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
            listener=listener.detach(), key=self.key, ranks={"beta": (1,)}, node_timeout_s=silent_s / SHARE_OF_TIMEOUT
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
            deadline_s=DEADLINE_S,
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

    def step(self, number: int) -> None:
        for rank in self.ranks:
            rank.begin(number)
            rank.collective("tp@0", "all_reduce")
            rank.end()

    def await_verdict(self, cause: str) -> Verdict:
        expires_at = time.monotonic() + DEADLINE_S
        while time.monotonic() < expires_at:
            verdict = self.judge.verdict(time.monotonic_ns())
            if verdict is not None and verdict.cause == cause:
                return verdict
            time.sleep(0.01)
        raise AssertionError(f"no verdict {cause!r}")

    def await_linked(self) -> None:
        expires_at = time.monotonic() + DEADLINE_S
        assert self.judge._others is not None
        while not self.judge._others._nodes["beta"].has_joined:
            self.judge.look(time.monotonic_ns(), 1)
            assert time.monotonic() < expires_at
            time.sleep(0.01)

    def await_told(self, step: int) -> None:
        """Until the judge has heard that rank 1 is through with a step."""
        expires_at = time.monotonic() + DEADLINE_S
        while not self._is_through(step):
            assert time.monotonic() < expires_at, f"rank 1 is not heard to be through with step {step}"
            time.sleep(0.01)

    def _is_through(self, step: int) -> bool:
        rank = self.judge.look(time.monotonic_ns(), NUM_RECORDS).ranks.get(1)
        decision = rank.decision(step) if rank is not None else None
        return decision is not None and decision.is_done and rank is not None and rank.entries.phase == "idle"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """No node of it is lost for being silent: here it may only have had no core."""
    monkeypatch.setattr(other_nodes, "SILENT_S", NEVER_S)
    with ExitStack() as stack:
        yield Cluster(stack, NEVER_S)


@pytest.fixture
def impatient_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, SILENT_S)


def test_ranks_of_both_nodes_are_judged_together(cluster: Cluster) -> None:
    for number in range(1, 20):
        cluster.step(number)
    cluster.await_told(19)
    assert cluster.judge.verdict(time.monotonic_ns()) is None
    cluster.ranks[1].begin(20)
    cluster.ranks[1].issue("tp@0", "all_reduce")
    cluster.ranks[0].begin(20)
    cluster.ranks[0].issue("tp@0", "all_gather")
    verdict = cluster.await_verdict("diverged")
    assert (verdict.culprits, verdict.nodes, verdict.sequence) == ((0,), ("alpha",), 20), verdict


def test_a_watcher_that_ends_is_told_at_once_and_its_node_cannot_be_judged(cluster: Cluster) -> None:
    cluster.step(1)
    cluster.await_told(1)
    cluster.end_watcher()
    verdict = cluster.await_verdict("lost")
    assert (verdict.culprits, verdict.nodes) == ((1,), ("beta",))
    assert str(verdict).startswith(
        "node beta (rank 1) is gone or cannot be reached: nothing comes from its watcher since"
    )
    assert verdict.waited_s < NEVER_S, "silence alone would not have told"


def test_a_node_that_is_silent_and_then_speaks_again(
    impatient_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = impatient_cluster
    cluster.step(1)
    cluster.await_told(1)
    may_send = threading.Event()
    monkeypatch.setattr(MessageLink, "can_send", lambda self: may_send.is_set())
    verdict = cluster.await_verdict("lost")
    assert verdict.nodes == ("beta",) and verdict.waited_s >= SILENT_S
    may_send.set()
    expires_at = time.monotonic() + DEADLINE_S
    while cluster.judge.verdict(time.monotonic_ns()) is not None:
        assert time.monotonic() < expires_at


def test_who_has_not_the_key_or_is_not_awaited_is_no_node(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.await_linked()
    monkeypatch.setattr(dialling, "_PAUSE_S", NEVER_S)  # it does not try again, so need not be short of time
    for key, hello, complaint in [
        (RunKey.new(), Hello(VERSION, "beta", (1,), 1, 0), "has not the key"),
        (cluster.key, Hello(VERSION, "gamma", (1,), 1, 0), "is not one of this run's nodes"),
        (cluster.key, Hello(VERSION, "beta", (1,), 1, 0), "has a watcher already"),
    ]:
        with pytest.raises(StartError, match=complaint):
            dialling.dial("127.0.0.1", cluster.port, key, hello, party="a stranger", deadline_s=DEADLINE_S)


def test_silence_counts_only_while_somebody_listens() -> None:
    second = 10**9
    silence = Silence(0)
    for tenth in range(1, 21):
        silence.look(tenth * second // 10, has_come=False)
    assert silence.seconds == pytest.approx(2.0)
    silence.look(3600 * second, has_come=False)
    assert silence.seconds == pytest.approx(2.5), "this process was stopped for an hour"
    silence.look(3601 * second, has_come=True)
    assert silence.seconds == 0.0
