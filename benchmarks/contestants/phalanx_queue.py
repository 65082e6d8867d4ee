"""Phalanx's MessageQueue with the messages that the engine sends; a contestant of control_plane.py."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial

from contest import BLOCK_SIZE, LARGE_BYTES, NUM_REQUESTS, num_workers, serve

from phalanx.errors import PeerDiedError
from phalanx.protocol.columns import ints
from phalanx.protocol.worker import (
    Call,
    CommandBody,
    Done,
    Ping,
    Reply,
    ReplyBody,
    Step,
    StepPlan,
    StepShape,
    WorkerMessage,
)
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.queue import MessageQueue, QueueHandle, WorkerEndpoint

DEADLINE_S = 60.0


def done(_: Call) -> ReplyBody:
    """Next to nothing."""
    return Done()


def work(handle: QueueHandle, answer: Callable[[Call], ReplyBody] = done) -> None:
    """Answer every call, until the brain is gone."""
    endpoint: WorkerEndpoint[Call, WorkerMessage] = WorkerEndpoint.attach(
        handle, command_type=Call, reply_type=WorkerMessage
    )
    with endpoint:
        while True:
            try:
                found = endpoint.get(timeout_s=None)
            except PeerDiedError:
                return
            assert found is not None
            endpoint.put(Reply(found[0].call_id, answer(found[0])), deadline_s=DEADLINE_S)


def one_step() -> Step:
    """A decode step of 256 requests, of which one in BLOCK_SIZE gets a new block."""
    slots = range(NUM_REQUESTS)
    plan = StepPlan(
        epoch=1,
        step=1000,
        shape=StepShape(NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS),
        slots=ints(slots),
        num_tokens=ints([1] * NUM_REQUESTS),
        block_slots=ints(slots[::BLOCK_SIZE]),
        block_ids=ints(range(5000, 5000 + NUM_REQUESTS // BLOCK_SIZE)),
    )
    return Step((plan,))


def round_trip(
    queue: MessageQueue[Call, WorkerMessage] | ClusterQueue[Call, WorkerMessage],
    ranks: tuple[int, ...],
    body: CommandBody,
    buffers: Sequence[bytes],
) -> None:
    queue.put(Call(1, body, ranks), buffers, deadline_s=DEADLINE_S)
    for _ in ranks:
        assert queue.get(timeout_s=DEADLINE_S) is not None


def main() -> None:
    ranks = tuple(range(num_workers()))
    names = [f"rank {rank}" for rank in ranks]
    queue: MessageQueue[Call, WorkerMessage] = MessageQueue(names, command_type=Call, reply_type=WorkerMessage)
    with queue:
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=work, args=(queue.handle(rank),), daemon=True) for rank in ranks]
        for worker in workers:
            worker.start()
        call = partial(round_trip, queue, ranks)
        call(Ping(), ())  # returns when all have attached
        calls = {"tiny": partial(call, Ping(), ()), "step": partial(call, one_step(), ())}
        calls |= {name: partial(call, Ping(), (b"\1" * size,)) for name, size in LARGE_BYTES.items()}
        serve(calls, [worker.pid for worker in workers if worker.pid])
    for worker in workers:
        worker.join(DEADLINE_S)


if __name__ == "__main__":
    main()
