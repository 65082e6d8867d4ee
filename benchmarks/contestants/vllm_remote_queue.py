"""vLLM's MessageQueue to workers on another host, as RayExecutorV2 uses it. A contestant of relay.py (its Python)."""

from __future__ import annotations

from multiprocessing.connection import Connection

from contest import SecondHost, num_workers
from vllm.distributed.device_communicators.shm_broadcast import (  # type: ignore[import-not-found]
    Handle,
    MessageQueue,
)
from vllm_queue import SUCCESS, compete


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
    host = SecondHost.of_arguments()
    compete(MessageQueue(num_workers(), 0, connect_ip=host.brain_address), work, host)


if __name__ == "__main__":
    main()
