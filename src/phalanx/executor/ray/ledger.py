"""The ledger over a cluster: journals on every node, a watcher beside them, and the judge beside the brain.

What ranks on the brain's node note is held by the engine's process, and the judge reads it itself. On every other node
the agent holds it, and a watcher of its own tells the judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import msgspec

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.executor.ending import living
from phalanx.executor.journals import dump_order, make_journals, who_is_ended
from phalanx.executor.presence import open_outlets
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.ray.line_processes import LineProcesses
from phalanx.executor.ray.messages import NodeReport
from phalanx.executor.watching import ENDS_WITHOUT_HOPE, Watching, start_watching
from phalanx.ledger.limits import Limits
from phalanx.ledger.other_nodes import OtherNodesOrder
from phalanx.ledger.reporting import Judge
from phalanx.ledger.verdict import Cause
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.address import address_of, listen_on
from phalanx.transport.keys import RunKey
from phalanx.transport.shared_memory import SegmentHandle

LIKE_A_STALL: frozenset[Cause] = frozenset({"late", "behind", "hung"})
"""What a network between nodes that stalls looks like as well: the run is to survive that."""


class Ledger(NamedTuple):
    """What is kept on the brain's node, and what the other nodes are to do."""

    watching: Watching | None
    journals: Mapping[int, SegmentHandle]
    """Of the ranks on this node."""
    reports: Mapping[str, NodeReport]
    """By node id."""

    @classmethod
    def none(cls) -> Self:
        """Nobody notes anything."""
        return cls(None, {}, {})


def keep_ledger(
    config: Config,
    processes: LineProcesses,
    groups: Sequence[GroupSpec],
    launcher: RayLauncher,
    resources: ExitStack,
    ends_after_s: Mapping[Cause, float] = ENDS_WITHOUT_HOPE,
) -> Ledger:
    """Start the judge, which listens when this returns, and has the ranks killed for verdicts that have stood for so
    long. All of it ends with `resources`.

    None, with a warning, if it cannot be started: the ranks do without.
    """
    here = [rank for rank in processes.placed if rank.is_driver_node]
    parties = {rank.rank: party for rank in here for party in living([rank.pid], f"rank {rank.rank}")}
    journals = make_journals([rank.rank for rank in here], resources, parties)
    names = {rank.rank: _names(groups, rank.rank) for rank in processes.placed}
    remote = processes.ranks_of_agents()
    order = WatchOrder(
        ranks=tuple(_watched(processes.placed[rank], names[rank], journal) for rank, journal in journals.items()),
        groups={group.name: group.ranks for group in groups if group.size > 1},
        limits=Limits(step_timeout_s=config.executor.step_timeout_s, start_timeout_s=config.executor.start_timeout_s),
        outlets=open_outlets(config, resources, num_elsewhere=sum(map(len, remote.values()))),
        dump=dump_order(config),
    )
    if not remote:
        watching = _start(config, order, launcher, ends_after_s, resources)
        return Ledger(watching, journals, {}) if watching is not None else Ledger.none()
    key = RunKey.new()
    with listen_on(processes.brain_address) as listener:
        address, port = address_of(listener)
        others = OtherNodesOrder(
            listener=listener.fileno(),
            key=key,
            ranks={processes.placed[ranks[0]].node: tuple(ranks) for ranks in remote.values()},
            node_timeout_s=config.cluster.node_timeout_s,
            steps_ahead=max(config.parallel.pipeline_parallel_size, 2),  # as the brain has under way at most
        )
        order = msgspec.structs.replace(order, other_nodes=others)
        patient = outlast_stalls(ends_after_s, config.cluster.node_timeout_s)
        watching = _start(config, order, launcher, patient, resources)
    if watching is None:
        return Ledger.none()
    judge = Judge(address=address, port=port, key=key)
    reports = {
        node_id: NodeReport(judge=judge, groups={rank: names[rank] for rank in ranks})
        for node_id, ranks in remote.items()
    }
    return Ledger(watching, journals, reports)


def outlast_stalls(ends_after_s: Mapping[Cause, float], node_timeout_s: float) -> dict[Cause, float]:
    """Have no ranks killed for what a stall of the network looks like, as long as such a stall may last."""
    return {
        cause: max(stands_s, node_timeout_s) if cause in LIKE_A_STALL else stands_s
        for cause, stands_s in ends_after_s.items()
    }


def _start(
    config: Config,
    order: WatchOrder,
    launcher: RayLauncher,
    ends_after_s: Mapping[Cause, float],
    resources: ExitStack,
) -> Watching | None:
    def ending_of(rank: int) -> str | None:
        return launcher.exits().get(rank)

    watching = start_watching(order, launcher.kill, ending_of, who_is_ended(config, ends_after_s))
    if watching is not None:
        resources.callback(watching.close)
    return watching


def _watched(rank: PlacedRank, groups: tuple[str, ...], journal: SegmentHandle) -> WatchedRank:
    return WatchedRank(rank=rank.rank, node=rank.node, groups=groups, journal=journal)


def _names(groups: Sequence[GroupSpec], rank: int) -> tuple[str, ...]:
    """By their index in a rank's records; the first is of no group."""
    return ("", *(group.name for group in groups if rank in group.ranks))
