"""From room on a Ray cluster to ranks in their places, linked to the brain and ready to be told who they are."""

from __future__ import annotations

from contextlib import ExitStack

import msgspec

from phalanx.config import Config
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.groups import describe_group
from phalanx.executor.guarding import with_boards
from phalanx.executor.line_plan import LinePlan
from phalanx.executor.placed import Placed
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.head import HeadWatch, WatchedChannel
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.ray.ledger import Ledger, keep_ledger
from phalanx.executor.ray.link import Linked, link_locally, link_nodes
from phalanx.executor.ray.placement import RayPlacement
from phalanx.models.checkpoint import Checkpoint
from phalanx.topology.grid import Grid
from phalanx.worker.spec import WorkerSpec


def place_on_ray(
    placement: RayPlacement,
    checkpoint: Checkpoint,
    grid: Grid,
    on_progress: OnProgress,
    deadline: Deadline,
    line: LinePlan,
    resources: ExitStack,
) -> Placed:
    """Place the ranks of a line, a process each.

    Raises ConfigError, PlacementError; StartError or DeadlineError naming the rank or node that did not come up.
    """
    config = placement.config
    processes = placement.make_processes(
        str(checkpoint.path),
        line.epoch,
        on_progress,
        deadline,
        has_memory=bool(line.memory),
        is_beside=line.is_beside,
        note=line.note,
    )
    resources.callback(processes.kill)
    groups = [
        describe_group(
            config,
            members,
            one_host=len({processes.placed[rank].node_id for rank in members.ranks}) == 1,
            epoch=line.epoch,
        )
        for members in grid.groups()
    ]
    launcher = RayLauncher(processes)
    resources.callback(launcher.let_go)
    ledger = Ledger.none()
    if config.executor.ledger:
        ledger = keep_ledger(config, processes, groups, launcher, resources, line.ends_after_s)
    if processes.agents:
        linked = link_nodes(config, processes, groups, ledger.reports, resources)
    else:
        linked = link_locally(processes.placed, groups, resources)
    journals = {**ledger.journals, **linked.journals}
    specs = [
        msgspec.structs.replace(_spec(config, checkpoint, rank, linked, line), journal=journals.get(rank.rank))
        for rank in processes.placed
    ]
    if config.executor.collective_guard != "off":
        specs = with_boards(specs, [rank.rank for rank in processes.placed if rank.is_driver_node], resources)
    watch = resources.enter_context(HeadWatch.of_connection())
    nodes = tuple(rank.node for rank in processes.placed)
    return Placed(launcher, WatchedChannel(linked.channel, watch), specs, ledger.watching, nodes)


def _spec(config: Config, checkpoint: Checkpoint, rank: PlacedRank, linked: Linked, line: LinePlan) -> WorkerSpec:
    return WorkerSpec(
        rank=rank.rank,
        local_rank=rank.local_rank,
        ranks_on_host=rank.ranks_on_host,
        device=config.executor.device,
        config=config,
        checkpoint=str(checkpoint.path),
        epoch=line.epoch,
        groups=tuple(group for group in linked.groups if rank.rank in group.ranks),
        queue=linked.queues[rank.rank],
        node_address=linked.brain_address if rank.is_driver_node else rank.address,
        held=line.memory.get(rank.rank),
        keeps_memory=line.keeps_memory,
    )
