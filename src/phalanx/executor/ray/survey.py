"""Where the ranks of a configuration would run, found out with actors that load nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from phalanx.config import Config
from phalanx.executor.deadline import Deadline
from phalanx.executor.groups import describe_group
from phalanx.executor.ray.assignment import PlacedRank
from phalanx.executor.ray.connection import connect
from phalanx.executor.ray.placement import RayPlacement
from phalanx.topology.grid import Grid
from phalanx.topology.placement import aligned


class PlacedGroup(msgspec.Struct, frozen=True):
    """A process group of the ranks."""

    name: str
    backend: str
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]


class Placement(msgspec.Struct, frozen=True):
    """Where ranks would run, and which groups they would form."""

    ranks: tuple[PlacedRank, ...]
    groups: tuple[PlacedGroup, ...]

    def table(self) -> str:
        """A line for each rank, then one for each group."""
        rows = [("rank", "replica", "stage", "tp rank", "node", "address", "bundle", "device", "pid")]
        for rank in self.ranks:
            node = f"{rank.node} (driver)" if rank.is_driver_node else rank.node
            device = f"GPU {rank.devices[rank.local_rank]}" if rank.devices else "cpu"
            where = (str(rank.rank), str(rank.replica), str(rank.stage), str(rank.tp_rank), node, rank.address)
            rows.append((*where, str(rank.bundle), device, str(rank.pid)))
        groups = [("group", "backend", "ranks", "nodes")]
        groups += [(one.name, one.backend, " ".join(map(str, one.ranks)), ", ".join(one.nodes)) for one in self.groups]
        return f"{aligned(rows)}\n\n{aligned(groups)}"


def survey(config: Config) -> Placement:
    """Place the ranks for a moment, those of replicas that run apart one replica after the other. Blocks for seconds.

    Raises PlacementError, ConfigError, StartError, DeadlineError as the start itself would.
    """
    ranks: list[PlacedRank] = []
    with ExitStack() as resources:
        deadline = Deadline(config.executor.start_timeout_s)
        resources.enter_context(connect(config.cluster, num_ranks=config.parallel.world_size))
        for replica, own in enumerate(config.of_engines()):
            placement = resources.enter_context(RayPlacement(own, lambda *_: None))
            placed = placement.survey(lambda *_: None, deadline)
            ranks += [_of_all(rank, replica, first=len(ranks)) for rank in placed]
    config = msgspec.structs.replace(config, executor=placement.config.executor)
    return Placement(tuple(ranks), _groups(config, ranks))


def _of_all(placed: PlacedRank, replica: int, *, first: int) -> PlacedRank:
    """A rank as it is numbered among all. `replica` counts engines: a lockstep group is one, and numbers its own."""
    return msgspec.structs.replace(placed, rank=first + placed.rank, replica=replica + placed.replica)


def _groups(config: Config, ranks: Sequence[PlacedRank]) -> tuple[PlacedGroup, ...]:
    groups = []
    for members in Grid.of(config.parallel).groups():
        nodes = tuple(dict.fromkeys(ranks[rank].node for rank in members.ranks))
        backend = describe_group(config, members, one_host=len(nodes) == 1).backend
        groups.append(PlacedGroup(members.name, backend, members.ranks, nodes))
    return tuple(groups)
