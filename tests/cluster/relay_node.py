"""The process of a node, for tests on hosts of their own: a relay and ranks that echo.

    relay_node.py NODE BRAIN_ADDRESS PORT KEY_IN_HEX RANK...

Prints how the link ended. Its ranks end with it.
"""

from __future__ import annotations

import multiprocessing
import sys

from transport_channels import echo

from phalanx.errors import PhalanxError
from phalanx.transport.keys import RunKey
from phalanx.transport.relay import NodeRelay


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
