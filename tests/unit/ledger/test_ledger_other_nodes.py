"""What the judge hears of another node, over a real link: its ranks, or that nothing is heard."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn, cast

import pytest
from ledger_ranks import WritingRank

from phalanx.errors import StartError
from phalanx.executor.beats import CHECK_S, SILENT_CHECKS
from phalanx.ledger import other_nodes, reporting
from phalanx.ledger.elsewhere import ElsewhereWriter, elsewhere_bytes, read_elsewhere
from phalanx.ledger.journal_layout import JOURNAL_BYTES, NUM_RECORDS
from phalanx.ledger.other_nodes import OUTLIVED, SHARE_OF_TIMEOUT, OtherNodesOrder, Silence, _Node
from phalanx.ledger.patience import LEAST_S
from phalanx.ledger.reporting import SEND_S, Judge, ReportOrder, report
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.ledger.watcher import Watcher
from phalanx.transport import dialling
from phalanx.transport.address import address_of, listen_on
from phalanx.transport.handshake import VERSION
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Hello
from phalanx.transport.message_link import MessageLink
from phalanx.transport.shared_memory import SharedSegment

SILENT_S = 0.5
NEVER_S = 3600.0
NUM_RESTARTS = 2
"""Of beta's watcher, before this one."""
STEPS_AHEAD = 2
DEADLINE_S = 60.0


def refuse(*_: object, **__: object) -> NoReturn:
    raise StartError("the link", "connecting", "no route to host")


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
            listener=listener.detach(),
            key=self.key,
            ranks={"beta": (1,)},
            node_timeout_s=silent_s / SHARE_OF_TIMEOUT,
            steps_ahead=STEPS_AHEAD,
        )
        order = WatchOrder(ranks=(watched[0],), groups={"tp@0": (0, 1)}, other_nodes=others)
        self.judge = stack.enter_context(Watcher(order))
        self._stop, self._stopping = os.pipe()
        stack.callback(os.close, self._stop)
        self._report = ReportOrder(
            node="beta",
            watch=WatchOrder(ranks=(watched[1],), groups={}, num_restarts=NUM_RESTARTS),
            judge=Judge(address="127.0.0.1", port=self.port, key=self.key),
            own_address="127.0.0.1",
        )
        self._thread = threading.Thread()
        self.num_beats = 0
        stack.callback(self.end_watcher)

    def start_watcher(self) -> None:
        """That of beta."""
        self._thread = threading.Thread(target=report, args=(self._report, self._stop, self.beat))
        self._thread.start()

    def beat(self) -> None:
        """Of the watcher of beta."""
        self.num_beats += 1

    def end_watcher(self) -> None:
        """That of beta."""
        if self._stopping >= 0:
            os.close(self._stopping)
            self._stopping = -1
            if self._thread.ident is not None:
                self._thread.join()

    def break_link(self) -> None:
        """As a firewall does that forgets it: both ends have it closed."""
        link = self.beta._link
        assert link is not None
        link._connection.shutdown(socket.SHUT_RDWR)

    @property
    def beta(self) -> _Node:
        """As the judge has it."""
        assert self.judge._others is not None
        return self.judge._others._nodes["beta"]

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

    def await_peace(self) -> None:
        """Until no verdict stands."""
        expires_at = time.monotonic() + DEADLINE_S
        while (verdict := self.judge.verdict(time.monotonic_ns())) is not None:
            assert time.monotonic() < expires_at, verdict
            time.sleep(0.01)

    def await_step(self, number: int) -> None:
        """Until the judge has seen rank 1 in it."""
        expires_at = time.monotonic() + DEADLINE_S
        while self.judge.look(time.monotonic_ns(), 1).ranks[1].entries.step != number:
            assert time.monotonic() < expires_at, f"step {number} of rank 1 is not heard of"
            time.sleep(0.01)

    def await_rank(self, rank: int) -> None:
        """Until the judge has seen it."""
        expires_at = time.monotonic() + DEADLINE_S
        while rank not in self.judge.look(time.monotonic_ns(), 1).ranks:
            assert time.monotonic() < expires_at, f"nothing is heard of rank {rank}"
            time.sleep(0.01)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """No node of it is lost for being silent: here it may only have had no core."""
    monkeypatch.setattr(other_nodes, "SILENT_S", NEVER_S)
    with ExitStack() as stack:
        cluster = Cluster(stack, NEVER_S)
        cluster.start_watcher()
        yield cluster


@pytest.fixture
def impatient_cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(stack, SILENT_S)
        cluster.start_watcher()
        yield cluster


def test_ranks_of_both_nodes_are_judged_together(cluster: Cluster) -> None:
    for number in range(1, 20):
        cluster.step(number)
    cluster.await_rank(1)
    assert cluster.judge.num_restarts_elsewhere == NUM_RESTARTS
    assert cluster.judge.verdict(time.monotonic_ns()) is None
    cluster.ranks[1].begin(20)
    cluster.ranks[1].issue("tp@0", "all_reduce")
    cluster.ranks[0].begin(20)
    cluster.ranks[0].issue("tp@0", "all_gather")
    verdict = cluster.await_verdict("diverged")
    assert (verdict.culprits, verdict.nodes, verdict.sequence) == ((0,), ("alpha",), 20), verdict


def test_a_watcher_that_ends_is_told_and_its_node_cannot_be_judged(cluster: Cluster) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    cluster.end_watcher()
    verdict = cluster.await_verdict("lost")
    assert (verdict.culprits, verdict.nodes) == ((1,), ("beta",))
    assert str(verdict).startswith(
        "node beta (rank 1) is gone or cannot be reached: nothing comes from its watcher since"
    )
    assert verdict.waited_s < NEVER_S, "silence alone would not have told"


def test_a_link_that_breaks_is_dialled_again_and_all_is_told_anew(cluster: Cluster) -> None:
    """Also what is over since then, of which a record was told that is none of the newest any more."""
    cluster.step(1)
    cluster.await_rank(1)
    cluster.ranks[1].begin(2)
    cluster.ranks[1].issue("tp@0", "all_reduce")
    cluster.await_step(2)
    for break_number in range(3):
        first = cluster.beta._link
        cluster.break_link()
        if not break_number:
            cluster.ranks[1].done("tp@0")
            cluster.ranks[1].end()
            cluster.ranks[0].begin(2)
            cluster.ranks[0].collective("tp@0", "all_reduce")
            cluster.ranks[0].end()
            for number in range(3, 3 + NUM_RECORDS // 8):
                cluster.step(number)
        expires_at = time.monotonic() + DEADLINE_S
        while cluster.beta._link in (first, None) or cluster.beta._is_new:
            assert time.monotonic() < expires_at, "nothing is heard again"
            cluster.judge.verdict(time.monotonic_ns())
            time.sleep(0.01)
    cluster.await_peace()
    records = cluster.judge.look(time.monotonic_ns()).ranks[1].entries.records
    assert all(record.is_done for record in records), "what was told over the old link holds no more"


def test_a_node_that_is_lost_is_no_more_when_its_watcher_is_back(cluster: Cluster) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    with pytest.MonkeyPatch.context() as network:
        network.setattr(reporting, "dial", refuse)
        cluster.break_link()
        cluster.await_verdict("lost")
    cluster.await_peace()
    cluster.ranks[0].begin(2)
    cluster.ranks[0].issue("tp@0", "all_gather")
    cluster.ranks[1].begin(2)
    cluster.ranks[1].issue("tp@0", "all_reduce")
    assert cluster.await_verdict("diverged").sequence == 2, "and its ranks are judged"


def test_a_node_without_a_watcher_is_not_lost_as_long_as_steps_go_on(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    cluster.end_watcher()
    cluster.await_verdict("lost")
    for number in range(2, 3 + STEPS_AHEAD):
        assert cluster.judge.verdict(time.monotonic_ns()) is not None, "so far ranks may come without each other"
        cluster.step(number)
    for _ in range(5):
        assert cluster.judge.verdict(time.monotonic_ns()) is None
    said = [record.getMessage() for record in caplog.records if "is not watched" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("node beta (rank 1) is not watched: nothing comes from its watcher")

    cluster.ranks[0].begin(10)
    cluster.ranks[0].issue("tp@0", "all_reduce float32 [3, 72]")
    verdict = cluster.await_verdict("lost")
    assert verdict.waited_s >= LEAST_S and (verdict.culprits, verdict.waiting, verdict.step) == ((1,), (0,), 10)
    assert "is not watched, and may be what others wait for" in str(verdict)
    cluster.ranks[0].done("tp@0")
    cluster.ranks[0].end()
    assert cluster.judge.verdict(time.monotonic_ns()) is None


def test_an_idle_node_is_not_lost_when_the_run_has_outlived_its_silence(impatient_cluster: Cluster) -> None:
    """The run's own link to it would have ended."""
    cluster = impatient_cluster
    cluster.step(1)
    cluster.await_rank(1)
    cluster.end_watcher()
    cluster.await_verdict("lost")
    cluster.await_peace()
    assert cluster.beta._silence.seconds >= OUTLIVED * SILENT_S / SHARE_OF_TIMEOUT


def test_a_watcher_that_never_comes_is_no_verdict_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        cluster = Cluster(stack, NEVER_S)
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(other_nodes, "JOIN_S", 0.2)
        cluster.ranks[0].begin(1)
        expires_at = time.monotonic() + 0.5
        while time.monotonic() < expires_at:
            assert cluster.judge.verdict(time.monotonic_ns()) is None
            time.sleep(0.01)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 and said[0].startswith("node beta (rank 1) is not watched: its watcher has not come")
        cluster.start_watcher()
        cluster.step(2)
        cluster.await_rank(1)
        cluster.judge.verdict(time.monotonic_ns())
    assert not cluster.beta._has_warned, "it has come at last"


def test_a_node_s_watcher_beats_with_and_without_a_judge(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    monkeypatch.setattr(reporting, "dial", refuse)
    for breaks in (False, True):
        if breaks:
            cluster.break_link()
        before, expires_at = cluster.num_beats, time.monotonic() + DEADLINE_S
        while cluster.num_beats < before + 20:
            assert time.monotonic() < expires_at
            time.sleep(0.01)


class Link:
    """Of a reporter, which notes how long a message may take."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.given_s: set[float] = set()

    def receive(self) -> list[object]:
        return []

    def can_send(self) -> bool:
        return True

    has_arrived = can_send

    def send(self, message: object, *, deadline_s: float, stop: int | None) -> None:
        self.given_s.add(deadline_s)


@pytest.mark.parametrize("timeout_s", [3.0, 600.0])
def test_what_the_network_does_not_take_keeps_no_watcher_from_beating_for_long(
    cluster: Cluster, timeout_s: float
) -> None:
    link = Link(timeout_s)
    reporting._Reporter(cast(Any, link), cluster.judge, NUM_RESTARTS, cluster._stop).turn()
    assert link.given_s == {min(timeout_s, SEND_S)} and SEND_S < CHECK_S * SILENT_CHECKS


def test_a_node_that_is_silent_and_then_speaks_again(
    impatient_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = impatient_cluster
    cluster.step(1)
    cluster.await_rank(1)
    may_send = threading.Event()
    monkeypatch.setattr(MessageLink, "can_send", lambda self: may_send.is_set())
    verdict = cluster.await_verdict("lost")
    assert verdict.nodes == ("beta",) and verdict.waited_s >= SILENT_S
    may_send.set()
    cluster.await_peace()


def test_who_has_not_the_key_or_is_not_awaited_is_no_node(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    monkeypatch.setattr(dialling, "_PAUSE_S", NEVER_S)  # it does not try again, so need not be short of time
    for key, hello, complaint in [
        (RunKey.new(), Hello(VERSION, "beta", (1,), 1, 0), "has not the key"),
        (cluster.key, Hello(VERSION, "gamma", (1,), 1, 0), "is not one of this run's nodes"),
        (cluster.key, Hello(VERSION, "beta", (1, 2), 1, 0), "is not one of this run's nodes"),
        (cluster.key, Hello("0.0", "beta", (1,), 1, 0), "has Phalanx 0.0"),
    ]:
        with pytest.raises(StartError, match=complaint):
            dialling.dial("127.0.0.1", cluster.port, key, hello, party="a stranger", deadline_s=DEADLINE_S)


def test_what_is_shown_of_another_node(impatient_cluster: Cluster) -> None:
    cluster = impatient_cluster
    memory = memoryview(bytearray(elsewhere_bytes(1)))
    writer = ElsewhereWriter(memory)
    assert read_elsewhere(memory) == ()
    cluster.step(1)
    cluster.await_rank(1)
    cluster.await_step(1)
    shown_ns = time.monotonic_ns()
    writer.show(cluster.judge.nodes_seen, shown_ns)
    (node,) = read_elsewhere(memory)
    assert (node.node, node.ranks, node.word) == ("beta", (1,), "heard") and node.seen_ns
    (rank,) = node.looks
    newest = rank.collectives("tp@0")[1]
    assert (rank.rank, rank.node, rank.text(newest)) == (1, "beta", "all_reduce")
    cluster.end_watcher()
    cluster.await_verdict("lost")
    writer.show(cluster.judge.nodes_seen, shown_ns + 10**8)
    assert read_elsewhere(memory)[0].word == "heard", "not at every look"
    writer.show(cluster.judge.nodes_seen, shown_ns + 10**9)
    (node,) = read_elsewhere(memory)
    assert node.word == "lost" and node.looks == (rank,), "what was known last"
    cluster.await_peace()
    writer.show(cluster.judge.nodes_seen, shown_ns + 2 * 10**9)
    (node,) = read_elsewhere(memory)
    assert (node.word, node.looks) == ("unwatched", ())


def test_what_is_too_much_to_be_shown_is_shown_without_records(cluster: Cluster) -> None:
    cluster.step(1)
    cluster.await_rank(1)
    memory = memoryview(bytearray(2048))
    ElsewhereWriter(memory).show(lambda: 2 * cluster.judge.nodes_seen(), time.monotonic_ns())
    assert [len(node.looks[0].entries.records) for node in read_elsewhere(memory)] == [0, 0]


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
