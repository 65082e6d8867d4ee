"""The process groups of a run: how the ranks of each are to join it, by where they are."""

from __future__ import annotations

from phalanx.collectives.rendezvous import Rendezvous, open_rendezvous
from phalanx.collectives.spec import Backend, GroupSpec, pick_backend
from phalanx.config import Config
from phalanx.errors import ConfigError
from phalanx.protocol.worker import FIRST_EPOCH
from phalanx.topology.grid import GroupMembers

COLLECTIVE_TIMEOUT_SHARE = 0.75
"""Of a step's: ranks that wait for a peer give up, and say for which, before the brain, which knows of no peers."""


def describe_group(config: Config, members: GroupMembers, *, one_host: bool, epoch: int = FIRST_EPOCH) -> GroupSpec:
    """The group without its rendezvous, which ranks of one host also need. Raises ConfigError."""
    return GroupSpec(
        members.name,
        _backend(config, members, one_host),
        members.ranks,
        epoch,
        timeout_s=config.executor.step_timeout_s * COLLECTIVE_TIMEOUT_SHARE,
        join_timeout_s=config.executor.start_timeout_s * COLLECTIVE_TIMEOUT_SHARE,
        runs_ahead=members.is_link,
        agrees=config.executor.collective_guard == "strict",
    )


def open_group(group: GroupSpec) -> Rendezvous:
    """The rendezvous of a described group, all of whose ranks are on this host."""
    return open_rendezvous(
        group.name,
        group.backend,
        group.ranks,
        epoch=group.epoch,
        timeout_s=group.timeout_s,
        join_timeout_s=group.join_timeout_s,
        runs_ahead=group.runs_ahead,
        agrees=group.agrees,
    )


def _backend(config: Config, members: GroupMembers, one_host: bool) -> Backend:
    asked = config.executor.collective_backend
    if asked == "auto" or len(members.ranks) == 1:
        return pick_backend(config.executor.device, len(members.ranks), one_host)
    if asked == "shm" and not one_host:
        ranks = ", ".join(f"rank {rank}" for rank in members.ranks)
        raise ConfigError("collective_backend", asked, f"auto or gloo: {ranks} are on several hosts")
    return asked
