"""What a worker is told at its birth. Knows no torch, so that the brain can write it."""

from __future__ import annotations

import msgspec

from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.memory.held import HeldMemory
from phalanx.transport.queue import QueueHandle
from phalanx.transport.shared_memory import SegmentHandle


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's place in the run."""

    rank: int
    local_rank: int
    """Index into the devices of this host."""
    ranks_on_host: int
    device: str
    """`cpu` or `cuda`."""
    config: Config
    checkpoint: str
    """Directory of the resolved checkpoint on this host."""
    epoch: int
    groups: tuple[GroupSpec, ...]
    """Those that the rank is a member of; any two ranks have the groups that they share in the same order."""
    queue: QueueHandle | None
    """How to reach the brain; None when the worker lives in the brain's own process."""
    journal: SegmentHandle | None = None
    """Where the rank notes what it does; None if nobody reads it."""
    board: SegmentHandle | None = None
    """Where the rank says what it has issued in each step, if the brain is on the same host and compares it."""
    node_address: str = "127.0.0.1"
    """An IP address of this host that the other ranks' hosts reach; loopback will do when all are on one host."""
    held: HeldMemory | None = None
    """Weights and KV cache of a worker of this rank before it, with the same configuration, checkpoint and number of
    blocks: then they are taken over instead of read and made. As Holder.memory gives it."""
    keeps_memory: bool = False
    """Whether somebody is going to hold the rank's memory, so that it tells what there is (protocol.Allocated)."""
    threads: int | None = None
    """CPU threads of the rank; those of its environment if None."""
