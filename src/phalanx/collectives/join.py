"""From a spec to a group."""

from __future__ import annotations

import torch

from phalanx.collectives.exchange import Exchange
from phalanx.collectives.group import Group
from phalanx.collectives.shared_memory import SharedMemoryGroup
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec


def join(spec: GroupSpec, rank: int, device: torch.device, exchange: Exchange | None) -> Group:
    """Join the group of `spec` as global rank `rank`, for tensors on `device`. Blocks until every member has joined.

    Only a group that spans hosts cannot do without `exchange`.

    Raises DeadlineError, which names the ranks that did not come within `spec.join_timeout_s`; PeerDiedError when the
    process that opened the rendezvous is gone, FrameError when it has closed it.
    """
    if spec.backend == "single":
        return SingleGroup(spec)
    if spec.backend == "shm":
        return SharedMemoryGroup(spec, rank)
    # torch.distributed takes a while to import, and most groups do without it.
    from phalanx.collectives.spanning import SpanningGroup
    from phalanx.collectives.torch_distributed import GlooGroup, NcclGroup

    if spec.backend == "nccl":
        return NcclGroup(spec, rank, device, exchange)
    if not spec.spans_hosts:
        return GlooGroup(spec, rank)
    assert exchange is not None
    return SpanningGroup(spec, rank, exchange)
