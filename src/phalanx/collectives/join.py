"""From a spec to a group."""

from __future__ import annotations

import torch

from phalanx.collectives.group import Group
from phalanx.collectives.shared_memory import SharedMemoryGroup
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec


def join(spec: GroupSpec, rank: int, device: torch.device) -> Group:
    """Join the group of `spec` as `rank`, for tensors on `device`. Blocks until every rank has joined.

    Raises DeadlineError, which names the ranks that did not come within `spec.timeout_s`; PeerDiedError when the
    process that opened the rendezvous is gone, FrameError when it has closed it.
    """
    if spec.backend == "single":
        return SingleGroup(spec)
    if spec.backend == "shm":
        return SharedMemoryGroup(spec, rank)
    # torch.distributed takes a while to import, and most groups do without it.
    from phalanx.collectives.torch_distributed import GlooGroup, NcclGroup

    return GlooGroup(spec, rank) if spec.backend == "gloo" else NcclGroup(spec, rank, device)
