"""From room on a Ray cluster to ranks in their places, linked to the brain and ready to be told who they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from phalanx.config import Config
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.groups import describe_group
from phalanx.executor.guarding import with_boards
from phalanx.executor.launcher import Killable
from phalanx.executor.placed import Placed
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.head import HeadWatch, WatchedChannel
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.ray.ledger import Ledger, keep_ledger
from phalanx.executor.ray.link import Linked, link_locally, link_nodes
from phalanx.executor.ray.quarters import Quarters
from phalanx.ledger.verdict import Cause
from phalanx.memory.held import HeldMemory
from phalanx.models.checkpoint import Checkpoint
from phalanx.topology.grid import Grid
from phalanx.transport.shared_memory import SegmentHandle
from phalanx.worker.spec import WorkerSpec


def place_on_ray(
    quarters: Quarters,
    checkpoint: Checkpoint,
    grid: Grid,
    on_progress: OnProgress,
    deadline: Deadline,
    resources: ExitStack,
    *,
    epoch: int,
    memory: Mapping[int, HeldMemory],
    keeps_memory: bool,
    ends_after_s: Mapping[Cause, float],
    is_beside: bool,
    note: Callable[[Killable], None],
) -> Placed:
    """Place the ranks of a line in their quarters, a process each. What is particular to it is as LinePlan says.

    Raises ConfigError, PlacementError; StartError or DeadlineError naming the rank or node that did not come up.
    """
    config = quarters.config
    crew = quarters.hire(
        str(checkpoint.path),
        epoch,
        on_progress,
        deadline,
        has_memory=bool(memory),
        is_beside=is_beside,
        note=note,
    )
    resources.callback(crew.kill)
    groups = [
        describe_group(
            config, members, one_host=len({crew.placed[rank].node_id for rank in members.ranks}) == 1, epoch=epoch
        )
        for members in grid.groups()
    ]
    launcher = RayLauncher(crew)
    resources.callback(launcher.let_go)
    ledger = Ledger.none()
    if config.executor.ledger:
        ledger = keep_ledger(config, crew, groups, launcher, resources, ends_after_s)
    if crew.agents:
        linked = link_nodes(config, crew, groups, ledger.reports, resources)
    else:
        linked = link_locally(crew.placed, groups, resources)
    journals = {**ledger.journals, **linked.journals}
    specs = [
        _spec(
            config,
            checkpoint,
            rank,
            linked,
            epoch=epoch,
            journal=journals.get(rank.rank),
            held=memory.get(rank.rank),
            keeps_memory=keeps_memory,
        )
        for rank in crew.placed
    ]
    if config.executor.collective_guard != "off":
        specs = with_boards(specs, [rank.rank for rank in crew.placed if rank.is_driver_node], resources)
    watch = resources.enter_context(HeadWatch.of_connection())
    nodes = tuple(rank.node for rank in crew.placed)
    return Placed(launcher, WatchedChannel(linked.channel, watch), specs, ledger.watching, nodes)


def _spec(
    config: Config,
    checkpoint: Checkpoint,
    rank: PlacedRank,
    linked: Linked,
    *,
    epoch: int,
    journal: SegmentHandle | None,
    held: HeldMemory | None,
    keeps_memory: bool,
) -> WorkerSpec:
    return WorkerSpec(
        rank=rank.rank,
        local_rank=rank.local_rank,
        ranks_on_host=rank.ranks_on_host,
        device=config.executor.device,
        config=config,
        checkpoint=str(checkpoint.path),
        epoch=epoch,
        groups=tuple(group for group in linked.groups if rank.rank in group.ranks),
        queue=linked.queues[rank.rank],
        journal=journal,
        node_address=linked.brain_address if rank.is_driver_node else rank.address,
        held=held,
        keeps_memory=keeps_memory,
    )
