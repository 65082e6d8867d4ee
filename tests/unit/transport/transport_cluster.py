"""A ClusterQueue with its nodes' relays, each in a thread, and an endpoint for every rank: all in this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from transport_messages import Command, Sum

from phalanx.errors import PhalanxError
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey
from phalanx.transport.queue import QueueShape, WorkerEndpoint
from phalanx.transport.relay import NodeRelay

Queue = ClusterQueue[Command, Sum]
Endpoint = WorkerEndpoint[Command, Sum]


class RunningRelay:
    """A node's relay in a thread. `ended_with` is what its `run` raised."""

    def __init__(self, queue: Queue, key: RunKey, node: str, ranks: Sequence[int], shape: QueueShape) -> None:
        self.relay = NodeRelay(node, ranks, shape=shape)
        self.relay.dial(queue.address, queue.port, key, deadline_s=10)
        self.ended_with: PhalanxError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.relay.run()
        except PhalanxError as error:
            self.ended_with = error

    def close(self) -> None:
        self.relay.close()
        self.thread.join(10)
        assert not self.thread.is_alive()


class Cluster:
    """Everything of one run. What the test leaves open is closed in the end."""

    def __init__(
        self,
        stack: ExitStack,
        local: Sequence[int],
        remote: Mapping[str, Sequence[int]],
        *,
        num_slots: int = 2,
        attached: bool = True,
        **options: Any,
    ) -> None:
        key, shape = RunKey.new(), QueueShape(num_slots=num_slots)
        options = {"address": "127.0.0.1", **options}
        self.queue: Queue = ClusterQueue(
            local, remote, command_type=Command, reply_type=Sum, key=key, shape=shape, **options
        )
        stack.callback(self.queue.close)
        self.relays = {node: RunningRelay(self.queue, key, node, ranks, shape) for node, ranks in remote.items()}
        for relay in self.relays.values():
            stack.callback(relay.close)
        self.queue.accept(deadline_s=10)
        self.handles = {rank: self.queue.handle(rank) for rank in local}
        for node, ranks in remote.items():
            self.handles |= {rank: self.relays[node].relay.handle(rank) for rank in ranks}
        self.workers = {rank: self.attach(rank) for rank in sorted(self.handles)} if attached else {}
        stack.callback(self.leave)

    def attach(self, rank: int) -> Endpoint:
        return WorkerEndpoint.attach(self.handles[rank], command_type=Command, reply_type=Sum)

    def leave(self) -> None:
        for worker in self.workers.values():
            worker.close()
