"""Says which nodes a Ray cluster has, and what is free there, while it is asked; a process for itself.

Ray's client ends the process that it is in when Ray's head has been gone for a minute. So the one that asks, which
serves requests, has none. This one takes no part in the cluster: it only reads what Ray's head knows.

Usage: python -m phalanx.executor.ray.census DESCRIPTOR PARENT_PID
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # compiled

from phalanx.config import ClusterConfig
from phalanx.errors import PeerDiedError, UserError
from phalanx.executor.census import CensusAnswer, CensusQuestion
from phalanx.executor.ray.connection import LOCAL, nodes_with
from phalanx.executor.ray.discovery import find_ray
from phalanx.executor.ray.probe import get_ready_for
from phalanx.executor.shared_fate import die_with_parent
from phalanx.transport.interfaces import interface_addresses
from phalanx.transport.liveness import Party
from phalanx.transport.stream import Stream

ANSWER_DEADLINE_S = 5.0
IDLE_S = 10.0
"""Nobody asks for so long: it ends, and whoever asks then starts another one."""


class Reader:
    """Of one cluster."""

    def __init__(self) -> None:
        self._address: str | None = None
        """Of Ray's head, once it is connected to."""

    def answer(self, question: CensusQuestion) -> CensusAnswer:
        try:
            if not self._connect(question.cluster):
                return CensusAnswer(has_cluster=False)
            return CensusAnswer(nodes=tuple(nodes_with(question.resource, _is_here)))
        except (UserError, ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
            return CensusAnswer(error=str(error).strip().partition("\n")[0])

    def _connect(self, cluster: ClusterConfig) -> bool:
        """As an engine would find it, but as a reader. False if there is none."""
        if self._address is not None:
            return True
        address = cluster.ray_address or os.environ.get("RAY_ADDRESS") or find_ray()
        if address is None or address == LOCAL:
            return False
        get_ready_for(address)
        options = GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        ray._private.state.state._initialize_global_state(options)
        self._address = address
        return True


def _is_here(node: Mapping[str, Any]) -> bool:
    return node["NodeManagerAddress"] in {held.address for held in interface_addresses()}


def main() -> None:
    descriptor, parent_pid = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    reader, decode = Reader(), msgspec.msgpack.Decoder(CensusQuestion).decode
    with Stream(descriptor, Party.of("who asks", parent_pid)) as stream, suppress(PeerDiedError):
        while stream.wait(IDLE_S):
            for frame in stream.poll():
                stream.send(msgspec.msgpack.encode(reader.answer(decode(frame))), deadline_s=ANSWER_DEADLINE_S)


if __name__ == "__main__":
    main()
