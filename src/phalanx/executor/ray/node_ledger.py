"""The ledger on a node beside the brain's: its ranks' journals, and a watcher that tells the judge (ledger.py)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from phalanx.executor.journals import make_journals
from phalanx.executor.ray.messages import NodeOrder, NodeReport
from phalanx.executor.watching import start_watching
from phalanx.ledger.reporting import ReportOrder
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SegmentHandle


def report_node(
    told: NodeOrder, report: NodeReport, processes: Mapping[int, Party], resources: ExitStack
) -> dict[int, SegmentHandle]:
    """A node's journals, by rank, and its watcher. All of it ends with `resources`. `processes`: by rank.

    None, with a warning, if there is no memory for them.
    """
    journals = make_journals(told.ranks, resources, processes)
    if not journals:
        return journals
    ranks = [
        WatchedRank(rank=rank, node=told.name, groups=report.groups[rank], journal=journals[rank])
        for rank in told.ranks
    ]
    order = ReportOrder(
        node=told.name,
        watch=WatchOrder(ranks=tuple(ranks), groups={}),
        judge=report.judge,
        own_address=told.own_address,
    )
    watching = start_watching(order)
    if watching is not None:
        resources.callback(watching.close)
    return journals
