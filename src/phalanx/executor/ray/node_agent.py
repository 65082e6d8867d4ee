"""The actor that stands for a node beside the driver's: the brain's link ends in it, and its memory is the node's."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import msgspec

from phalanx.errors import PhalanxError
from phalanx.executor.groups import open_group
from phalanx.executor.ray.ending import kill
from phalanx.executor.ray.fate import end_with_raylet
from phalanx.executor.ray.messages import NodeOrder, NodeReady
from phalanx.executor.ray.node_ledger import report_node
from phalanx.executor.ray.rank_actor import introduction
from phalanx.transport.liveness import Party
from phalanx.transport.relay import NodeRelay
from phalanx.transport.shared_memory import SegmentHandle

FAREWELL_S = 0.5
"""For Ray to take the answer along before the process ends."""
DISMISSAL_S = 1.5
"""For the driver to dismiss this actor, after a link that it closed. Of one that goes by itself Ray tells the user."""
TAIL_BYTES = 4096
RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")


class NodeAgent:
    """One node's agent. `tail` and `kill` are called while `run` runs, in another thread."""

    def __init__(self) -> None:
        end_with_raylet()
        self._resources = ExitStack()
        self._relay: NodeRelay | None = None
        self._ranks: list[Party] = []

    def introduce(self) -> bytes:
        """Who and where this is: an encoded Introduction."""
        return msgspec.msgpack.encode(introduction())

    def prepare(self, order: bytes) -> bytes:
        """Link the node to the brain; an encoded NodeReady. Raises RuntimeError that says why it cannot be."""
        try:
            return msgspec.msgpack.encode(self._prepare(msgspec.msgpack.decode(order, type=NodeOrder)))
        except PhalanxError as error:
            raise RuntimeError(str(error)) from None  # an exception of ours does not survive Ray's way of sending it

    def _prepare(self, told: NodeOrder) -> NodeReady:
        self._relay = relay = NodeRelay(told.name, list(told.ranks))
        self._resources.callback(relay.close)
        for rank, pid in zip(told.ranks, told.pids, strict=True):
            self._ranks.append(Party.of(f"rank {rank}", pid))
            relay.expect(rank, self._ranks[-1])
        groups = [self._resources.enter_context(open_group(group)).spec for group in told.groups]
        relay.dial(
            told.brain_address,
            told.brain_port,
            told.key,
            deadline_s=told.deadline_s,
            source_address=told.own_address,
        )
        queues = tuple(relay.handle(rank) for rank in told.ranks)
        journals: dict[int, SegmentHandle] = {}
        if told.report is not None:
            processes = dict(zip(told.ranks, self._ranks, strict=True))
            journals = report_node(told, told.report, processes, self._resources)
        return NodeReady(queues, tuple(groups), journals)

    def run(self) -> str:
        """Relay until the link ends, then say why; the process ends soon after, and the node's ranks with it."""
        assert self._relay is not None
        stay_s = FAREWELL_S
        try:
            self._relay.run()
            how, stay_s = "the brain closed its link", DISMISSAL_S
        except PhalanxError as error:
            how = str(error)
        finally:
            self._resources.close()
            threading.Timer(stay_s, os._exit, (0,)).start()
        return how

    def tail(self, log: str) -> str:
        """The end of a log file of this node."""
        return tail(log)

    def kill(self) -> None:
        """Kill the node's ranks; returns before they have ended."""
        for rank in self._ranks:
            kill(rank)


def tail(log: str) -> str:
    """The last lines of a log, without Ray's own marks; empty if it cannot be read."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if not line.startswith(RAY_MARKS))
