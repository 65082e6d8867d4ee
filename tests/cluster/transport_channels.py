"""Channels between a brain and ranks in processes of their own: what is true of one is true of all."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from transport_messages import Tick

from phalanx.errors import PeerDiedError
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey
from phalanx.transport.queue import DEFAULT_SHAPE, MessageQueue, QueueHandle, QueueShape, WorkerEndpoint
from phalanx.transport.relay import NodeRelay

FORK = multiprocessing.get_context("fork")
DEADLINE_S = 30.0

AnyQueue = MessageQueue[Any, Any] | ClusterQueue[Any, Any]

LAYOUTS: dict[str, Callable[[list[int]], tuple[list[int], dict[str, list[int]]]]] = {
    "shared memory": lambda ranks: (ranks, {}),
    "relay": lambda ranks: ([], {"node-b": ranks}),
    "two relays": lambda ranks: ([], {"node-b": ranks[::2], "node-c": ranks[1::2]}),
    "shared memory and relay": lambda ranks: (ranks[::2], {"node-b": ranks[1::2]}),
}
"""Which ranks are on the brain's host, and on which other nodes."""


class Channel:
    """A queue and its ranks' processes. `relays` are the processes of the other nodes."""

    def __init__(self, queue: AnyQueue, handles: Mapping[int, QueueHandle], relays: Sequence[Any]) -> None:
        self.queue = queue
        self.handles = handles
        self.relays = relays


@contextmanager
def open_channel(
    layout: str,
    num_ranks: int,
    command_type: Any,
    reply_type: Any,
    shape: QueueShape = DEFAULT_SHAPE,
    node_timeout_s: float = 10.0,
) -> Iterator[Channel]:
    """The queue, with its relays dialled in and a handle for each rank."""
    local, remote = LAYOUTS[layout](list(range(num_ranks)))
    remote = {node: ranks for node, ranks in remote.items() if ranks}
    types = {"command_type": command_type, "reply_type": reply_type}
    with ExitStack() as stack:
        if not remote:
            names = [f"rank {rank}" for rank in local]
            queue: AnyQueue = stack.enter_context(MessageQueue(names, **types, shape=shape))
            yield Channel(queue, {rank: queue.handle(rank) for rank in local}, [])
            return
        # Forked before the queue is there: its threads would not live in the children.
        agents = {node: _Agent(stack, node, ranks, shape) for node, ranks in remote.items()}
        key = RunKey.new()
        queue = ClusterQueue(
            local, remote, address="127.0.0.1", key=key, node_timeout_s=node_timeout_s, shape=shape, **types
        )
        stack.enter_context(queue)
        handles = {rank: queue.handle(rank) for rank in local}
        for agent in agents.values():
            agent.pipe.send((queue.address, queue.port, key))
            handles |= agent.pipe.recv()
        queue.accept(deadline_s=DEADLINE_S)
        yield Channel(queue, handles, [agent.process for agent in agents.values()])


def echo(handle: QueueHandle) -> None:
    """A rank that sends back what it gets. It ends when its queue does."""
    endpoint: WorkerEndpoint[Tick, Tick] = WorkerEndpoint.attach(handle, command_type=Tick, reply_type=Tick)
    with endpoint, suppress(PeerDiedError):
        while (found := endpoint.get(timeout_s=120)) is not None:
            endpoint.put(found[0], found[1], deadline_s=120)


class _Agent:
    """The process of another node."""

    def __init__(self, stack: ExitStack, node: str, ranks: Sequence[int], shape: QueueShape) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_relay, args=(theirs, node, ranks, shape))
        self.process.start()
        stack.callback(self.process.close)
        stack.callback(self.process.join, DEADLINE_S)


def _relay(pipe: Connection, node: str, ranks: Sequence[int], shape: QueueShape) -> None:
    relay = NodeRelay(node, ranks, shape=shape)
    address, port, key = pipe.recv()
    pipe.send({rank: relay.handle(rank) for rank in ranks})
    relay.dial(address, port, key, deadline_s=DEADLINE_S)
    relay.run()
