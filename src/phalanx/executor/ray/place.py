"""From a configuration to actors in their places, linked to the brain and ready to be told their ranks."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import msgspec

from phalanx.config import Config
from phalanx.executor.deadline import Deadline
from phalanx.executor.executor import OnProgress
from phalanx.executor.groups import describe_group
from phalanx.executor.guarding import with_boards
from phalanx.executor.placed import Placed
from phalanx.executor.platform import torch_has_cuda
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.connection import Connection, connect
from phalanx.executor.ray.crew import Crew
from phalanx.executor.ray.head import HeadWatch, WatchedChannel
from phalanx.executor.ray.launcher import RayLauncher
from phalanx.executor.ray.ledger import Ledger, keep_ledger
from phalanx.executor.ray.link import Linked, link_locally, link_nodes
from phalanx.executor.ray.reservation import reserve
from phalanx.models.checkpoint import Checkpoint
from phalanx.protocol import FIRST_EPOCH, StartProgress
from phalanx.topology.grid import Grid
from phalanx.topology.placement import split_groups
from phalanx.transport.shared_memory import SegmentHandle
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.executor")


def place_on_ray(
    config: Config,
    checkpoint: Checkpoint,
    grid: Grid,
    on_progress: OnProgress,
    deadline: Deadline,
    resources: ExitStack,
) -> Placed:
    """Place the ranks on the nodes of a Ray cluster, an actor each.

    Raises ConfigError, PlacementError; StartError or DeadlineError naming the rank or node that did not come up.
    """
    config, crew = hire(config, str(checkpoint.path), grid, on_progress, deadline, resources)
    groups = [
        describe_group(config, members, one_host=len({crew.placed[rank].node_id for rank in members.ranks}) == 1)
        for members in grid.groups()
    ]
    launcher = RayLauncher(crew)
    ledger = Ledger.none()
    if config.executor.ledger:
        ledger = keep_ledger(config, crew, groups, launcher, resources)
    if crew.agents:
        linked = link_nodes(config, crew, groups, ledger.reports, resources)
    else:
        linked = link_locally(crew.placed, groups, resources)
    journals = {**ledger.journals, **linked.journals}
    specs = [_spec(config, checkpoint, rank, linked, journals.get(rank.rank)) for rank in crew.placed]
    if config.executor.collective_guard != "off":
        specs = with_boards(specs, [rank.rank for rank in crew.placed if rank.is_driver_node], resources)
    watch = resources.enter_context(HeadWatch.of_connection())
    return Placed(launcher, WatchedChannel(linked.channel, watch), specs, ledger.watching)


def hire(
    config: Config, checkpoint: str, grid: Grid, on_progress: OnProgress, deadline: Deadline, resources: ExitStack
) -> tuple[Config, Crew]:
    """The configuration with its device settled, and actors in their places, which have introduced themselves."""
    for rank in range(grid.world_size):
        on_progress(StartProgress(rank, "placing"))
    connection = resources.enter_context(connect(config.cluster, num_ranks=grid.world_size))
    device = _pick_device(config, connection)
    config = msgspec.structs.replace(config, executor=msgspec.structs.replace(config.executor, device=device))
    config.check()
    reservation = reserve(connection, config, grid, device, resources)
    for group in split_groups(grid, reservation.places):
        log.warning(
            "the tensor-parallel group %s is on several nodes: its ranks meet over the network twice in every layer, "
            "so that a step takes many times as long",
            group,
        )
    crew = Crew(config, grid, checkpoint, reservation, deadline)
    resources.callback(crew.close)
    crew.introduce(on_progress)
    return config, crew


def _pick_device(config: Config, connection: Connection) -> str:
    if config.executor.device != "auto":
        return config.executor.device
    has_gpus = any(node.total > 0 for node in connection.nodes("GPU"))
    return "cuda" if has_gpus and torch_has_cuda() else "cpu"


def _spec(
    config: Config, checkpoint: Checkpoint, rank: PlacedRank, linked: Linked, journal: SegmentHandle | None
) -> WorkerSpec:
    return WorkerSpec(
        rank=rank.rank,
        local_rank=rank.local_rank,
        ranks_on_host=rank.ranks_on_host,
        device=config.executor.device,
        config=config,
        checkpoint=str(checkpoint.path),
        epoch=FIRST_EPOCH,
        groups=tuple(group for group in linked.groups if rank.rank in group.ranks),
        queue=linked.queues[rank.rank],
        journal=journal,
        node_address=linked.brain_address if rank.is_driver_node else rank.address,
    )
