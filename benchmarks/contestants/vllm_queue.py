"""vLLM's MessageQueue, used as its multiprocessing executor does. A contestant of control_plane.py (vLLM's Python)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from contest import BLOCK_SIZE, LARGE_BYTES, NUM_REQUESTS, num_workers, serve
from vllm.distributed.device_communicators.shm_broadcast import (  # type: ignore[import-not-found]
    Handle,
    MessageQueue,
)
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput  # type: ignore[import-not-found]

DEADLINE_S = 60.0
SUCCESS = 0


def work(rank: int, commands_handle: Handle, pipe: Connection) -> None:
    """Answer every call, until it is None."""
    commands = MessageQueue.create_from_handle(commands_handle, rank)
    replies = MessageQueue(1, 1)
    pipe.send(replies.export_handle())
    commands.wait_until_ready()
    replies.wait_until_ready()
    while commands.dequeue() is not None:
        replies.enqueue((SUCCESS, None))


def scheduler_output() -> SchedulerOutput:
    """A decode step of 256 requests, of which one in BLOCK_SIZE gets a new block."""
    names = [f"cmpl-{i:032x}-0" for i in range(NUM_REQUESTS)]
    return SchedulerOutput(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=CachedRequestData(
            req_ids=names,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[([5000 + i],) if i % BLOCK_SIZE == 0 else None for i in range(NUM_REQUESTS)],
            num_computed_tokens=[500 + i for i in range(NUM_REQUESTS)],
            num_output_tokens=[100 + i for i in range(NUM_REQUESTS)],
        ),
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=NUM_REQUESTS,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[0],
        finished_req_ids=set(),
        free_encoder_mm_hashes=[],
    )


def round_trip(commands: MessageQueue, replies: list[MessageQueue], method: str, argument: Any) -> None:
    commands.enqueue((method, (argument,), {}, None))
    for queue in replies:
        status, _ = queue.dequeue(timeout=DEADLINE_S)
        assert status == SUCCESS


def compete(commands: MessageQueue, work: Callable[..., None], *arguments: object) -> None:
    """Be a contestant, with workers that run `work(*arguments, rank, handle of the commands, pipe)`."""
    ranks = range(num_workers())
    spawn = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for rank in ranks:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=work, args=(*arguments, rank, commands.export_handle(), theirs), daemon=True)
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


def main() -> None:
    compete(MessageQueue(num_workers(), num_workers()), work)


if __name__ == "__main__":
    main()
