"""vLLM's MessageQueue to workers on another host, as RayExecutorV2 uses it. A contestant of relay.py (its Python)."""

from __future__ import annotations

import multiprocessing
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
from contest import LARGE_BYTES, SecondHost, num_workers, serve
from vllm.distributed.device_communicators.shm_broadcast import (  # type: ignore[import-not-found]
    Handle,
    MessageQueue,
)
from vllm_queue import DEADLINE_S, SUCCESS, round_trip, scheduler_output


def work(host: SecondHost, rank: int, commands_handle: Handle, pipe: Connection) -> None:
    """Answer every call, until it is None."""
    host.enter()
    commands = MessageQueue.create_from_handle(commands_handle, rank)
    replies = MessageQueue(1, 0, connect_ip=host.worker_address)
    pipe.send(replies.export_handle())
    commands.wait_until_ready()
    replies.wait_until_ready()
    while commands.dequeue() is not None:
        replies.enqueue((SUCCESS, None))


def main() -> None:
    ranks, host = range(num_workers()), SecondHost.of_arguments()
    spawn = multiprocessing.get_context("spawn")
    commands = MessageQueue(len(ranks), 0, connect_ip=host.brain_address)
    pipes, workers = [], []
    for rank in ranks:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=work, args=(host, rank, commands.export_handle(), theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)
    replies = [MessageQueue.create_from_handle(pipe.recv(), 0) for pipe in pipes]
    commands.wait_until_ready()
    for queue in replies:
        queue.wait_until_ready()
    call = partial(round_trip, commands, replies)
    calls = {"tiny": partial(call, "check_health", None), "step": partial(call, "execute_model", scheduler_output())}
    calls |= {name: partial(call, "load", np.ones(size, np.uint8)) for name, size in LARGE_BYTES.items()}
    serve(calls, [worker.pid for worker in workers if worker.pid])
    commands.enqueue(None)
    for worker in workers:
        worker.join(DEADLINE_S)


if __name__ == "__main__":
    main()
