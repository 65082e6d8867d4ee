"""Queues between real processes: everything arrives, in order and untorn, however they are scheduled."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import zlib
from collections.abc import Iterator

import msgspec
import pytest
from shared_memory_names import no_new_names
from transport_channels import FORK, LAYOUTS, AnyQueue, open_channel
from transport_messages import Stop

from phalanx.transport.queue import QueueHandle, QueueShape, WorkerEndpoint


class Frame(msgspec.Struct, tag=True, array_like=True):
    number: int
    checksum: int


def _checksum(buffers: list[memoryview] | list[bytes]) -> int:
    checksum = 0
    for buffer in buffers:
        checksum = zlib.crc32(buffer, checksum)
    return checksum


def _answer(handle: QueueHandle, pause_s: float) -> None:
    endpoint: WorkerEndpoint[Frame | Stop, Frame] = WorkerEndpoint.attach(
        handle, command_type=Frame | Stop, reply_type=Frame
    )
    with endpoint:
        while (found := endpoint.get(timeout_s=30)) is not None:
            message, buffers = found
            if isinstance(message, Stop):
                return
            time.sleep(pause_s * random.random())
            endpoint.put(Frame(message.number, _checksum(buffers)), buffers[:1], deadline_s=30)


@pytest.fixture(params=LAYOUTS)
def queue(request: pytest.FixtureRequest, num_ranks: int) -> Iterator[AnyQueue]:
    shape = QueueShape(slot_bytes=4096, num_slots=4)
    with no_new_names(), open_channel(request.param, num_ranks, Frame | Stop, Frame, shape=shape) as channel:
        handles = channel.handles.items()
        processes = [FORK.Process(target=_answer, args=(handle, 0.001 * (rank % 2))) for rank, handle in handles]
        for process in processes:
            process.start()
        yield channel.queue
        channel.queue.put(Stop(), deadline_s=30)
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
            process.close()


def _frame(number: int) -> list[bytes]:
    random_bytes = random.Random(number)
    sizes = [random_bytes.choice([0, 1, 100, 3900, 4096, 20_000]) for _ in range(random_bytes.randrange(4))]
    return [random_bytes.randbytes(size) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_everything_arrives_in_order_and_whole(queue: AnyQueue, num_ranks: int) -> None:
    num_frames = 400
    num_replies = [0] * num_ranks
    for number in range(num_frames):
        while number - min(num_replies) >= 4:  # keep several in flight, but never more than the rings hold
            _take(queue, num_replies)
        frame = _frame(number)
        queue.put(Frame(number, _checksum(frame)), frame, deadline_s=30)
    while min(num_replies) < num_frames:
        _take(queue, num_replies)
    assert num_replies == [num_frames] * num_ranks


def _take(queue: AnyQueue, num_replies: list[int]) -> None:
    found = queue.get(timeout_s=30)
    assert found is not None
    reader, reply, buffers = found
    frame = _frame(num_replies[reader])
    assert reply == Frame(num_replies[reader], _checksum(frame))
    assert [bytes(buffer) for buffer in buffers] == frame[:1]
    num_replies[reader] += 1


@pytest.mark.parametrize("num_ranks", [2])
def test_an_idle_queue_takes_no_cpu_in_any_process(queue: AnyQueue) -> None:
    queue.put(Frame(0, 0), deadline_s=30)
    for _ in range(2):
        assert queue.get(timeout_s=30) is not None
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    before = list(map(_cpu_ticks, pids))
    assert queue.get(timeout_s=1.0) is None
    after = map(_cpu_ticks, pids)  # of 10 ms; a heartbeat between nodes is far below one
    assert [later - earlier <= 1 for later, earlier in zip(after, before, strict=True)] == [True] * len(pids)


def _cpu_ticks(pid: int | None) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rsplit(b")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
