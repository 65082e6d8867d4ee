"""The process of a node, for tests on hosts of their own: a relay and ranks that echo.

    relay_node.py NODE BRAIN_ADDRESS PORT KEY_IN_HEX RANK...

Prints how the link ended. Its ranks end with it.
"""

from __future__ import annotations

import multiprocessing
import sys
from contextlib import suppress

import msgspec

from phalanx.errors import PeerDiedError, PhalanxError
from phalanx.transport.keys import RunKey
from phalanx.transport.queue import QueueHandle, WorkerEndpoint
from phalanx.transport.relay import NodeRelay


class Tick(msgspec.Struct, tag=True, array_like=True):
    number: int = 0


def echo(handle: QueueHandle) -> None:
    endpoint: WorkerEndpoint[Tick, Tick] = WorkerEndpoint.attach(handle, command_type=Tick, reply_type=Tick)
    with endpoint, suppress(PeerDiedError):
        while (found := endpoint.get(timeout_s=120)) is not None:
            endpoint.put(found[0], found[1], deadline_s=120)


def main() -> None:
    node, address, port, key = sys.argv[1:5]
    ranks = [int(rank) for rank in sys.argv[5:]]
    relay = NodeRelay(node, ranks)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=echo, args=(relay.handle(rank),)) for rank in ranks]
    for process in processes:
        process.start()
    try:
        relay.dial(address, int(port), RunKey(bytes.fromhex(key)), deadline_s=20)
        relay.run()
        print("goodbye", flush=True)
    except PhalanxError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        relay.close()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
