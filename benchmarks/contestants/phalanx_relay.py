"""Phalanx's ClusterQueue to a relay and workers on another host; a contestant of relay.py."""

from __future__ import annotations

import multiprocessing
from functools import partial
from multiprocessing.connection import Connection

from contest import LARGE_BYTES, SecondHost, num_workers, serve
from phalanx_queue import DEADLINE_S, one_step, round_trip, work

from phalanx.protocol.worker import Call, Ping, WorkerMessage
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey
from phalanx.transport.relay import NodeRelay

NODE = "second"


def relay(host: SecondHost, ranks: list[int], port: int, key: RunKey, handles: Connection) -> None:
    """The second host's agent."""
    host.enter()
    node = NodeRelay(NODE, ranks)
    handles.send([node.handle(rank) for rank in ranks])
    node.dial(host.brain_address, port, key, deadline_s=DEADLINE_S)
    node.run()


def main() -> None:
    ranks, host, key = list(range(num_workers())), SecondHost.of_arguments(), RunKey.new()
    queue: ClusterQueue[Call, WorkerMessage] = ClusterQueue(
        [], {NODE: ranks}, command_type=Call, reply_type=WorkerMessage, address=host.brain_address, key=key
    )
    with queue:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        processes = [spawn.Process(target=relay, args=(host, ranks, queue.port, key, theirs), daemon=True)]
        processes[0].start()
        for handle in ours.recv():
            processes.append(spawn.Process(target=work, args=(handle,), daemon=True))
            processes[-1].start()
        queue.accept(deadline_s=DEADLINE_S)
        call = partial(round_trip, queue, tuple(ranks))
        call(Ping(), ())  # returns when all have attached
        calls = {"tiny": partial(call, Ping(), ()), "step": partial(call, one_step(), ())}
        calls |= {name: partial(call, Ping(), (b"\1" * size,)) for name, size in LARGE_BYTES.items()}
        serve(calls, [process.pid for process in processes if process.pid])
    for process in processes:
        process.join(DEADLINE_S)


if __name__ == "__main__":
    main()
