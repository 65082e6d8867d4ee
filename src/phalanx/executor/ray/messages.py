"""What the driver and its actors tell each other. To Ray it is bytes, so that it pickles nothing of ours."""

from __future__ import annotations

import msgspec

from phalanx.collectives.spec import GroupSpec
from phalanx.ledger.reporting import Judge
from phalanx.transport.interfaces import InterfaceAddress
from phalanx.transport.keys import RunKey
from phalanx.transport.queue import QueueHandle
from phalanx.transport.shared_memory import SegmentHandle


class Preparation(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's actor is told to make its process for a line. There may be tokens in it: it is not for a
    constructor, whose arguments Ray keeps."""

    epoch: int
    rank: int
    environment: dict[str, str]
    """The driver's; what the node has set itself stays. That of the first line is that of all."""
    threads: int | None
    """CPU threads of the rank; None for an even share of the node's cores."""
    ranks_on_host: int
    visible_devices: str | None
    """For CUDA_VISIBLE_DEVICES: those of all ranks of this run on the host. None on the CPU."""
    checkpoint: str
    """Where the driver has it."""
    deadline_s: float


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor says when it is there."""

    node_id: str
    host: str
    pid: int
    raylet_pid: int
    log: str
    """The file on its node that its stderr goes to."""
    version: str
    devices: tuple[str, ...]
    """Physical ids of the devices that Ray has given to it."""
    addresses: tuple[InterfaceAddress, ...]
    """Of its host."""
    nicer_than_raylet: int
    """By so much its niceness is above that of its node's Ray, and nobody has told Ray so."""


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Watch the node's ranks, and tell the judge of all nodes."""

    judge: Judge
    groups: dict[int, tuple[str, ...]]
    """Of each rank: the names of its groups, by their index in its records."""


class NodeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """Link a line's ranks on a node to the brain, and prepare the groups that are on this node alone."""

    epoch: int
    name: str
    ranks: tuple[int, ...]
    pids: tuple[int, ...]
    """Of the ranks' processes."""
    brain_address: str
    brain_port: int
    own_address: str
    key: RunKey
    deadline_s: float
    groups: tuple[GroupSpec, ...]
    report: NodeReport | None
    """None without a ledger."""
    stay_s: float
    """How long the node waits for another line when this one has ended."""


class NodeReady(msgspec.Struct, frozen=True):
    """A node is linked: what its ranks need, in the order's order."""

    queues: tuple[QueueHandle, ...]
    groups: tuple[GroupSpec, ...]
    journals: dict[int, SegmentHandle]
    """By rank; none without a ledger."""
