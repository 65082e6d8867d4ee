"""From actors in their places to ranks that can speak with the brain and with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.executor.channel import Channel
from phalanx.executor.groups import open_group
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.calls import answers_to
from phalanx.executor.ray.line_processes import LineProcesses
from phalanx.executor.ray.messages import NodeOrder, NodeReady, NodeReport
from phalanx.protocol.worker import Call, WorkerMessage
from phalanx.transport.cluster_queue import ClusterQueue
from phalanx.transport.keys import RunKey
from phalanx.transport.liveness import Party
from phalanx.transport.queue import MessageQueue, QueueHandle
from phalanx.transport.shared_memory import SegmentHandle

DISMISSAL_S = 1.5
"""For the driver to dismiss an agent, after a link that it closed. Of one that goes by itself Ray tells the user."""


class Linked(NamedTuple):
    """The brain's channel, and what each rank needs of it and of its groups."""

    channel: Channel
    queues: dict[int, QueueHandle]
    """By rank."""
    groups: tuple[GroupSpec, ...]
    journals: dict[int, SegmentHandle]
    """By rank, of those on other nodes; none without a ledger."""
    brain_address: str


def link_locally(ranks: Sequence[PlacedRank], groups: Sequence[GroupSpec], resources: ExitStack) -> Linked:
    """All ranks are on this node: the same as with the local launcher."""
    queue: MessageQueue[Call, WorkerMessage] = MessageQueue(
        [_party(rank) for rank in ranks], command_type=Call, reply_type=WorkerMessage
    )
    resources.enter_context(queue)
    for rank in ranks:
        queue.expect(rank.rank, Party.of(_party(rank), rank.pid))
    opened = tuple(resources.enter_context(open_group(group)).spec for group in groups)
    return Linked(queue, {rank.rank: queue.handle(rank.rank) for rank in ranks}, opened, {}, "127.0.0.1")


def link_nodes(
    config: Config,
    processes: LineProcesses,
    groups: Sequence[GroupSpec],
    reports: Mapping[str, NodeReport],
    resources: ExitStack,
) -> Linked:
    """Each other node's agent dials in. What the ranks of one node share is made on that node.

    `reports`: by node, what its watcher is to do; none without a ledger.

    Raises StartError or DeadlineError naming the node that cannot be linked, ConfigError for a wrong address.
    """
    key = RunKey.new()
    queue = _listen(config, processes, key, resources)
    homes = {group.name: _home(group, processes.placed) for group in groups}
    orders = {
        node_id: _order(
            config,
            processes,
            ranks,
            queue,
            key,
            [group for group in groups if homes[group.name] == node_id],
            reports.get(node_id),
        )
        for node_id, ranks in processes.ranks_of_agents().items()
    }
    answers = answers_to(processes.prepare_nodes(orders), "linking", processes.deadline.remaining_s)
    queue.accept(deadline_s=processes.deadline.remaining_s)
    queues = {rank.rank: queue.handle(rank.rank) for rank in processes.placed if rank.is_driver_node}
    opened = {group.name: group for group in groups}
    journals: dict[int, SegmentHandle] = {}
    for order, answer in zip(orders.values(), answers, strict=True):
        ready = msgspec.msgpack.decode(answer, type=NodeReady)
        queues.update(zip(order.ranks, ready.queues, strict=True))
        opened.update((group.name, group) for group in ready.groups)
        journals.update(ready.journals)
    for group in groups:
        if homes[group.name] == processes.driver_node.node_id:
            opened[group.name] = resources.enter_context(open_group(group)).spec
    return Linked(queue, queues, tuple(opened[group.name] for group in groups), journals, queue.address)


def _listen(
    config: Config, processes: LineProcesses, key: RunKey, resources: ExitStack
) -> ClusterQueue[Call, WorkerMessage]:
    local = [rank for rank in processes.placed if rank.is_driver_node]
    queue: ClusterQueue[Call, WorkerMessage] = ClusterQueue(
        [rank.rank for rank in local],
        {processes.placed[ranks[0]].node: ranks for ranks in processes.ranks_of_agents().values()},
        command_type=Call,
        reply_type=WorkerMessage,
        address=processes.brain_address,
        key=key,
        node_timeout_s=config.cluster.node_timeout_s,
    )
    resources.enter_context(queue)
    for rank in local:
        queue.expect(rank.rank, Party.of(_party(rank), rank.pid))
    return queue


def _order(
    config: Config,
    processes: LineProcesses,
    ranks: Sequence[int],
    queue: ClusterQueue[Call, WorkerMessage],
    key: RunKey,
    groups: Sequence[GroupSpec],
    report: NodeReport | None,
) -> NodeOrder:
    placed = [processes.placed[rank] for rank in ranks]
    return NodeOrder(
        epoch=processes.epoch,
        name=placed[0].node,
        ranks=tuple(ranks),
        pids=tuple(rank.pid for rank in placed),
        brain_address=queue.address,
        brain_port=queue.port,
        own_address=placed[0].address,
        key=key,
        deadline_s=processes.deadline.remaining_s,
        groups=tuple(groups),
        report=report,
        stay_s=config.healing.heal_timeout_s if config.healing.heal else DISMISSAL_S,
    )


def _home(group: GroupSpec, ranks: Sequence[PlacedRank]) -> str | None:
    """The node whose memory a group's ranks share; None if they are on several."""
    nodes = {ranks[rank].node_id for rank in group.ranks}
    return nodes.pop() if len(nodes) == 1 else None


def _party(rank: PlacedRank) -> str:
    return f"rank {rank.rank}"
