"""One line's part of a node beside the driver's: its link to the brain, and the memory that its ranks share."""

from __future__ import annotations

from contextlib import ExitStack

from phalanx.executor.ending import await_ends, kill
from phalanx.executor.groups import open_group
from phalanx.executor.ray.messages import NodeOrder, NodeReady
from phalanx.executor.ray.node_ledger import report_node
from phalanx.transport.liveness import Party
from phalanx.transport.relay import NodeRelay
from phalanx.transport.shared_memory import SegmentHandle


class NodeLine:
    """`link`, then `run`; `end_ranks` from any thread."""

    def __init__(self, order: NodeOrder) -> None:
        """Raises PeerDiedError if one of the ranks is gone."""
        self._order = order
        self.stay_s = order.stay_s
        """How long the next line is awaited after this one."""
        self.is_running = False
        self._resources = ExitStack()
        self._relay = NodeRelay(order.name, list(order.ranks))
        self._resources.callback(self._relay.close)
        self._ranks = [Party.of(f"rank {rank}", pid) for rank, pid in zip(order.ranks, order.pids, strict=True)]
        for rank, party in zip(order.ranks, self._ranks, strict=True):
            self._relay.expect(rank, party)

    def link(self) -> NodeReady:
        """Dial in at the brain. Raises StartError, DeadlineError, PeerDiedError."""
        order = self._order
        groups = [self._resources.enter_context(open_group(group)).spec for group in order.groups]
        self._relay.dial(
            order.brain_address,
            order.brain_port,
            order.key,
            deadline_s=order.deadline_s,
            source_address=order.own_address,
        )
        queues = tuple(self._relay.handle(rank) for rank in order.ranks)
        journals: dict[int, SegmentHandle] = {}
        if order.report is not None:
            processes = dict(zip(order.ranks, self._ranks, strict=True))
            journals = report_node(order, order.report, processes, self._resources)
        return NodeReady(queues, tuple(groups), journals)

    def run(self) -> None:
        """Relay until the brain closes the link; then everything is let go. Raises as NodeRelay.run."""
        self.is_running = True
        try:
            self._relay.run()
        finally:
            self.close()

    def end_ranks(self, timeout_s: float) -> bool:
        """Kill them; whether all are gone within `timeout_s`."""
        for rank in self._ranks:
            kill(rank)
        return not await_ends(self._ranks, timeout_s)

    def close(self) -> None:
        """End the link and let everything go, ranks that are left included. May be called more than once."""
        for rank in self._ranks:
            kill(rank)
        self._resources.close()
