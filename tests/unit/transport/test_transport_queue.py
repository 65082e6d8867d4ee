from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from transport_messages import Add, Command, Stop, Sum

from phalanx.errors import DeadlineError, FrameError, PeerDiedError
from phalanx.transport.liveness import Party
from phalanx.transport.queue import MessageQueue, QueueHandle, QueueShape, WorkerEndpoint

Queue = MessageQueue[Command, Sum]
Endpoint = WorkerEndpoint[Command, Sum]


@pytest.fixture
def queue() -> Iterator[Queue]:
    shape = QueueShape(num_slots=2)
    with MessageQueue(["rank 0", "rank 1"], command_type=Command, reply_type=Sum, shape=shape) as made:
        yield made


@pytest.fixture
def workers(queue: Queue) -> Iterator[list[Endpoint]]:
    made = [attached(queue.handle(rank)) for rank in range(2)]
    yield made
    for worker in made:
        worker.close()


def attached(handle: QueueHandle) -> Endpoint:
    return WorkerEndpoint.attach(handle, command_type=Command, reply_type=Sum)


def test_a_command_reaches_every_worker_and_replies_tell_whose_they_are(queue: Queue, workers: list[Endpoint]) -> None:
    queue.put(Add(1, 2), deadline_s=1)
    for rank, worker in enumerate(workers):
        assert worker.get(timeout_s=1) == (Add(1, 2), [])
        worker.put(Sum(3 + rank), deadline_s=1)
    replies = [queue.get(timeout_s=1) for _ in workers]
    assert sorted(replies) == [(0, Sum(3), []), (1, Sum(4), [])]  # type: ignore[type-var]
    assert queue.get(timeout_s=0) is None


def test_the_handle_travels_as_a_message(queue: Queue) -> None:
    handle = queue.handle(1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(handle), type=QueueHandle) == handle


def test_commands_before_the_worker_attached_are_not_lost(queue: Queue) -> None:
    queue.put(Add(1, 2), deadline_s=1)
    with attached(queue.handle(0)) as worker:
        assert worker.get(timeout_s=1) == (Add(1, 2), [])


@pytest.mark.parametrize("size_bytes", [0, 1, 64, 4096, 65_536, 3_000_000])
def test_buffers_travel_beside_the_message(queue: Queue, workers: list[Endpoint], size_bytes: int) -> None:
    tensor = bytes(range(256)) * (size_bytes // 256) + bytes(size_bytes % 256)
    queue.put(Add(1, 2), [tensor, b"tail"], deadline_s=1)
    found = workers[0].get(timeout_s=1)
    assert found is not None
    command, buffers = found
    assert command == Add(1, 2)
    assert [bytes(buffer) for buffer in buffers] == [tensor, b"tail"]
    workers[0].put(Sum(0), buffers, deadline_s=1)
    reply = queue.get(timeout_s=1)
    assert reply is not None
    assert bytes(reply[2][0]) == tensor


def test_no_worker_hides_another(queue: Queue, workers: list[Endpoint]) -> None:
    workers[0].put(Sum(0), deadline_s=1)
    workers[1].put(Sum(1), deadline_s=1)
    order = []
    for _ in range(4):
        reply = queue.get(timeout_s=1)
        assert reply is not None
        order.append(reply[0])
        workers[reply[0]].put(Sum(0), deadline_s=1)
    assert order == [0, 1, 0, 1]


def test_get_waits_for_a_reply(queue: Queue, workers: list[Endpoint]) -> None:
    answer = threading.Timer(0.05, workers[1].put, args=(Sum(7),), kwargs={"deadline_s": 1})
    answer.start()
    assert queue.get(timeout_s=10) == (1, Sum(7), [])
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


def test_a_timeout_is_no_error(queue: Queue, workers: list[Endpoint]) -> None:
    assert queue.get(timeout_s=0.01) is None
    assert workers[0].get(timeout_s=0.01) is None


def test_idle_ends_take_no_cpu(queue: Queue, workers: list[Endpoint]) -> None:
    before = time.process_time()
    sleepers = [threading.Thread(target=end.get, kwargs={"timeout_s": 1.0}) for end in (queue, *workers)]
    for sleeper in sleepers:
        sleeper.start()
    for sleeper in sleepers:
        sleeper.join(10)
    assert time.process_time() - before < 0.02


def test_a_worker_that_does_not_read_is_named(queue: Queue, workers: list[Endpoint]) -> None:
    for _ in range(2):
        queue.put(Stop(), deadline_s=1)
    workers[1].get(timeout_s=1)
    with pytest.raises(DeadlineError, match="rank 0"):
        queue.put(Stop(), deadline_s=0.02)


def test_a_brain_that_does_not_read_is_named(workers: list[Endpoint]) -> None:
    for _ in range(2):
        workers[0].put(Sum(0), deadline_s=1)
    with pytest.raises(DeadlineError, match="brain"):
        workers[0].put(Sum(0), deadline_s=0.02)


def test_a_worker_that_leaves_is_reported_after_its_replies(queue: Queue, workers: list[Endpoint]) -> None:
    workers[1].put(Sum(1), deadline_s=1)
    workers[1].close()
    assert queue.get(timeout_s=1) == (1, Sum(1), [])
    for _ in range(2):
        with pytest.raises(PeerDiedError, match="rank 1"):
            queue.get(timeout_s=1)
    queue.forget(1)
    assert queue.get(timeout_s=0) is None
    for _ in range(5):
        queue.put(Stop(), deadline_s=0)
        assert workers[0].get(timeout_s=0) == (Stop(), [])


def test_a_worker_that_died_before_it_attached(queue: Queue) -> None:
    me = Party.me("rank 1")
    queue.expect(1, Party("rank 1", me.pid, me.start_time - 1))
    with pytest.raises(PeerDiedError, match="rank 1"):
        queue.get(timeout_s=1)
    with pytest.raises(PeerDiedError, match="rank 1"):
        queue.put(Stop(), deadline_s=1)


def test_workers_learn_that_the_brain_left_after_its_commands(queue: Queue, workers: list[Endpoint]) -> None:
    queue.put(Stop(), deadline_s=1)
    queue.close()
    assert workers[0].get(timeout_s=1) == (Stop(), [])
    with pytest.raises(PeerDiedError, match="brain"):
        workers[0].get(timeout_s=1)


def test_a_closed_queue_cannot_be_attached(queue: Queue) -> None:
    handle = queue.handle(0)
    queue.close()
    with pytest.raises(FrameError):
        attached(handle)


def test_close_wakes_a_sleeping_get(queue: Queue) -> None:
    closing = threading.Timer(0.05, queue.close)
    closing.start()
    assert queue.get(timeout_s=10) is None
    closing.join(10)


def test_what_is_no_reply_is_refused_and_passed_over(queue: Queue, workers: list[Endpoint]) -> None:
    workers[0].put(Add(1, 2), deadline_s=1)  # type: ignore[arg-type]
    workers[0].put(Sum(5), deadline_s=1)
    with pytest.raises(FrameError, match="rank 0"):
        queue.get(timeout_s=1)
    assert queue.get(timeout_s=1) == (0, Sum(5), [])


def test_a_type_that_cannot_travel_is_refused_at_once() -> None:
    with pytest.raises(TypeError):
        MessageQueue(["rank 0"], command_type=Add | Sum | int | complex | threading.Thread, reply_type=Sum)


def test_eight_workers_take_less_than_8_mib_each() -> None:
    with MessageQueue([f"rank {r}" for r in range(8)], command_type=Stop, reply_type=Sum) as queue:
        assert queue.handle(0).segment.size_bytes < 10 * 2**20
