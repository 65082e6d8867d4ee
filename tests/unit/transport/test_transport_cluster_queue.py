"""The queue over several nodes behaves as the queue of one: wherever a rank is, the brain sees the same."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from transport_cluster import Cluster, Queue
from transport_messages import Add, Command, Stop, Sum

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey
from phalanx.transport.link_messages import Goodbye
from phalanx.transport.liveness import Party

LAYOUTS = {
    "one node": ([], {"node-b": [0, 1]}),
    "two nodes": ([], {"node-b": [1], "node-c": [0]}),
    "here and there": ([0], {"node-b": [1]}),
    "there and here": ([1], {"node-b": [0]}),
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture(params=LAYOUTS, ids=str)
def cluster(request: pytest.FixtureRequest, stack: ExitStack) -> Cluster:
    return Cluster(stack, *LAYOUTS[request.param])


@pytest.fixture
def queue(cluster: Cluster) -> Queue:
    return cluster.queue


def test_a_command_reaches_every_rank_and_replies_tell_whose_they_are(cluster: Cluster, queue: Queue) -> None:
    queue.put(Add(1, 2), deadline_s=5)
    for rank, worker in cluster.workers.items():
        assert worker.get(timeout_s=5) == (Add(1, 2), [])
        worker.put(Sum(3 + rank), deadline_s=5)
    replies = [queue.get(timeout_s=5) for _ in cluster.workers]
    assert sorted(replies) == [(0, Sum(3), []), (1, Sum(4), [])]  # type: ignore[type-var]
    assert queue.get(timeout_s=0) is None


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 65_536, 3_000_000])
def test_buffers_travel_beside_the_message_both_ways(cluster: Cluster, queue: Queue, size_bytes: int) -> None:
    tensor = bytes(range(256)) * (size_bytes // 256) + bytes(size_bytes % 256)
    for _ in range(3):
        queue.put(Add(1, 2), [tensor, b"tail"], deadline_s=5)
        for worker in cluster.workers.values():
            found = worker.get(timeout_s=5)
            assert found is not None
            assert found[0] == Add(1, 2)
            assert [bytes(buffer) for buffer in found[1]] == [tensor, b"tail"]
            worker.put(Sum(0), found[1], deadline_s=5)
        for _ in cluster.workers:
            reply = queue.get(timeout_s=5)
            assert reply is not None
            assert [bytes(buffer) for buffer in reply[2]] == [tensor, b"tail"]


def test_commands_before_a_rank_attached_are_not_lost(stack: ExitStack) -> None:
    cluster = Cluster(stack, [], {"node-b": [0]}, attached=False)
    cluster.queue.put(Add(1, 2), deadline_s=5)
    with cluster.attach(0) as worker:
        assert worker.get(timeout_s=5) == (Add(1, 2), [])


def test_no_rank_hides_another(cluster: Cluster, queue: Queue) -> None:
    order = []
    for _ in range(8):
        for worker in cluster.workers.values():
            worker.put(Sum(0), deadline_s=5)
        for _ in cluster.workers:
            reply = queue.get(timeout_s=5)
            assert reply is not None
            order.append(reply[0])
    assert order.count(0) == order.count(1) == 8


def test_many_more_frames_than_a_ring_holds(cluster: Cluster, queue: Queue) -> None:
    def follow(rank: int) -> None:
        for number in range(300):
            assert cluster.workers[rank].get(timeout_s=10) == (Add(number, 0), [])
        cluster.workers[rank].put(Sum(rank), deadline_s=5)

    followers = [threading.Thread(target=follow, args=(rank,)) for rank in cluster.workers]
    for follower in followers:
        follower.start()
    for number in range(300):
        queue.put(Add(number, 0), deadline_s=10)  # nobody replies: only the credit tells that there is space
    for follower in followers:
        follower.join(30)
    assert sorted(reply[0] for reply in (queue.get(timeout_s=5) for _ in followers) if reply) == [0, 1]


def test_get_waits_for_a_reply(cluster: Cluster, queue: Queue) -> None:
    for rank, worker in cluster.workers.items():
        answer = threading.Timer(0.05, worker.put, args=(Sum(7),), kwargs={"deadline_s": 1})
        answer.start()
        assert queue.get(timeout_s=10) == (rank, Sum(7), [])
        answer.join(10)


def test_get_returns_when_something_else_happened(queue: Queue) -> None:
    happened = threading.Event()

    def happen() -> None:
        happened.set()
        queue.bell.ring()

    timer = threading.Timer(0.05, happen)
    timer.start()
    assert queue.get(timeout_s=10, until=happened.is_set) is None
    assert happened.is_set()
    timer.join(10)


def test_a_timeout_is_no_error(queue: Queue) -> None:
    started = time.monotonic()
    assert queue.get(timeout_s=0.05) is None
    assert 0.05 <= time.monotonic() - started < 0.5


def test_a_rank_that_does_not_read_is_named(cluster: Cluster, queue: Queue) -> None:
    for _ in range(2):
        queue.put(Stop(), deadline_s=5)
    for _ in range(3):
        cluster.workers[1].get(timeout_s=0.1)
    time.sleep(0.05)  # for its node to say that a whole ring is taken, and by whom
    with pytest.raises(DeadlineError, match="space in a ring of 2 frames from rank 0"):
        queue.put(Stop(), deadline_s=0.05)
    cluster.workers[0].get(timeout_s=5)
    cluster.workers[0].get(timeout_s=5)
    queue.put(Stop(), deadline_s=5)  # nothing was sent before


def test_a_brain_that_does_not_read_is_named_where_it_is(stack: ExitStack) -> None:
    cluster = Cluster(stack, [], {"node-b": [0]})
    worker = cluster.workers[0]
    tensor = bytes(4_000_000)
    with pytest.raises(DeadlineError, match="relay of node node-b"):
        for _ in range(20):
            worker.put(Sum(0), [tensor], deadline_s=0.2)
    assert cluster.queue.get(timeout_s=5) is not None


def test_a_rank_that_leaves_is_reported_after_its_replies(cluster: Cluster, queue: Queue) -> None:
    cluster.workers[1].put(Sum(1), deadline_s=5)
    cluster.workers[1].close()
    assert queue.get(timeout_s=5) == (1, Sum(1), [])
    for _ in range(2):
        with pytest.raises(PeerDiedError, match=rf"rank 1 \(pid {os.getpid()}\)"):
            queue.get(timeout_s=5)
    queue.forget(1)
    assert queue.get(timeout_s=0) is None
    for _ in range(5):
        queue.put(Stop(), deadline_s=5)
        assert cluster.workers[0].get(timeout_s=5) == (Stop(), [])


def test_a_rank_that_died_before_it_attached(stack: ExitStack) -> None:
    cluster = Cluster(stack, [], {"node-b": [4, 5]}, attached=False)
    me = Party.me("rank 5")
    cluster.relays["node-b"].relay.expect(5, Party("rank 5", me.pid, me.start_time - 1))
    with pytest.raises(PeerDiedError, match=r"rank 5.*on node node-b"):
        cluster.queue.get(timeout_s=5)


def test_forgetting_a_rank_takes_it_out_of_the_way_of_the_others(cluster: Cluster, queue: Queue) -> None:
    queue.put(Stop(), deadline_s=5)
    queue.put(Stop(), deadline_s=5)
    for _ in range(2):
        assert cluster.workers[0].get(timeout_s=5) is not None
    assert cluster.workers[0].get(timeout_s=0) is None
    with pytest.raises(DeadlineError, match="rank 1"):
        queue.put(Stop(), deadline_s=0.3)
    queue.forget(1)
    for _ in range(3):
        queue.put(Stop(), deadline_s=5)
        assert cluster.workers[0].get(timeout_s=5) == (Stop(), [])
    cluster.workers[1].put(Sum(1), deadline_s=5)
    assert queue.get(timeout_s=0.1) is None


def test_replies_of_a_forgotten_rank_that_have_come_are_dropped(cluster: Cluster, queue: Queue) -> None:
    for number in range(2):
        cluster.workers[1].put(Sum(number), deadline_s=5)
    time.sleep(0.1)  # for both to come
    assert queue.get(timeout_s=5) == (1, Sum(0), [])
    queue.forget(1)
    assert queue.get(timeout_s=0.1) is None


def test_ranks_learn_that_the_brain_left_after_its_commands(cluster: Cluster, queue: Queue) -> None:
    queue.put(Stop(), deadline_s=5)
    queue.close()
    for worker in cluster.workers.values():
        assert worker.get(timeout_s=5) == (Stop(), [])
        with pytest.raises(PeerDiedError, match=r"relay of node|brain"):
            worker.get(timeout_s=5)
    for relay in cluster.relays.values():
        relay.thread.join(5)
        assert relay.ended_with is None


def test_a_goodbye_ends_a_relay_whose_reply_the_network_does_not_take(stack: ExitStack) -> None:
    cluster = Cluster(stack, [], {"node-b": [0]})
    relay, (link,) = cluster.relays["node-b"], cluster.queue._links._links.values()
    cluster.workers[0].put(Sum(0), [bytes(40_000_000)], deadline_s=5)
    time.sleep(0.1)  # for the relay to fill the connection, from which nobody reads
    link._say(Goodbye())
    with suppress(OSError):  # the relay may be gone already
        link._connection.shutdown(socket.SHUT_WR)
    relay.thread.join(5)
    assert not relay.thread.is_alive()
    assert relay.ended_with is None


def test_a_relay_that_ends_is_a_death_that_names_its_ranks(cluster: Cluster, queue: Queue) -> None:
    node, relay = next(iter(cluster.relays.items()))
    ranks = relay.relay.ranks
    for rank in ranks:
        cluster.workers[rank].put(Sum(rank), deadline_s=5)
    for _ in ranks:
        assert queue.get(timeout_s=5) is not None
    relay.close()
    for _ in range(2):
        with pytest.raises(PeerDiedError, match=rf"node {node} \(rank {ranks[0]}.*pid {os.getpid()}"):
            queue.get(timeout_s=5)
    with pytest.raises(PeerDiedError, match=f"node {node}"):
        queue.put(Stop(), deadline_s=5)
    for rank in ranks:
        with pytest.raises(PeerDiedError):
            cluster.workers[rank].get(timeout_s=5)
        queue.forget(rank)
    queue.put(Stop(), deadline_s=5)
    assert queue.get(timeout_s=0.01) is None


def test_close_wakes_a_sleeping_get(queue: Queue) -> None:
    closing = threading.Timer(0.05, queue.close)
    closing.start()
    assert queue.get(timeout_s=10) is None
    closing.join(10)


def test_what_is_no_reply_is_refused_and_passed_over(cluster: Cluster, queue: Queue) -> None:
    cluster.workers[0].put(Add(1, 2), deadline_s=5)  # type: ignore[arg-type]
    cluster.workers[0].put(Sum(5), deadline_s=5)
    with pytest.raises(FrameError, match="rank 0"):
        queue.get(timeout_s=5)
    assert queue.get(timeout_s=5) == (0, Sum(5), [])


def test_idle_queues_and_relays_take_next_to_no_cpu(queue: Queue) -> None:
    before = time.process_time()
    assert queue.get(timeout_s=1.0) is None
    assert time.process_time() - before < 0.03


def test_nodes_that_do_not_come_are_named() -> None:
    remote = {"node-b": [2, 3], "node-c": [4]}
    with ClusterQueue(
        [0, 1], remote, command_type=Command, reply_type=Sum, address="127.0.0.1", key=RunKey.new()
    ) as queue:
        expected = r"a connection from node node-b \(rank 2, rank 3\), node node-c \(rank 4\)"
        with pytest.raises(DeadlineError, match=expected):
            queue.accept(deadline_s=0.05)
        assert queue.missing() == ("node-b", "node-c")


@pytest.mark.parametrize("address", ["::1", "localhost"])
def test_any_kind_of_address_will_do(stack: ExitStack, address: str) -> None:
    cluster = Cluster(stack, [0], {"node-b": [1]}, address=address)
    cluster.queue.put(Add(1, 2), deadline_s=5)
    assert cluster.workers[1].get(timeout_s=5) == (Add(1, 2), [])


def test_a_silent_node_is_a_deadline_that_names_it(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(stack, [0], {"node-b": [1, 2]}, node_timeout_s=0.5)
    link = cluster.relays["node-b"].relay._link
    assert link is not None
    with link._writer._lock:  # it cannot say anything now
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(DeadlineError, match=r"a sign of life from node node-b \(rank 1, rank 2\)"):
                cluster.queue.get(timeout_s=10)
        assert 0.4 < time.monotonic() - started < 1.5
        with pytest.raises(DeadlineError, match="node-b"):
            cluster.queue.put(Stop(), deadline_s=1)


def test_a_silent_brain_ends_its_nodes(stack: ExitStack) -> None:
    cluster = Cluster(stack, [], {"node-b": [0]}, node_timeout_s=0.5)
    cluster.queue._heartbeat.close()
    started = time.monotonic()
    relay = cluster.relays["node-b"]
    relay.thread.join(5)
    assert time.monotonic() - started < 1.5
    assert isinstance(relay.ended_with, DeadlineError)
    assert "a sign of life from brain" in str(relay.ended_with)
    with pytest.raises(PeerDiedError):
        cluster.workers[0].get(timeout_s=5)


def test_a_quiet_run_is_not_a_dead_one(stack: ExitStack) -> None:
    cluster = Cluster(stack, [0], {"node-b": [1]}, node_timeout_s=0.3)
    time.sleep(1.0)  # the brain looks at nothing meanwhile
    assert cluster.queue.get(timeout_s=0.5) is None
    cluster.queue.put(Stop(), deadline_s=1)
    assert cluster.workers[1].get(timeout_s=5) == (Stop(), [])
