"""How to join a process group: what the brain sends to every rank. No torch here."""

from __future__ import annotations

from typing import Literal

import msgspec

from phalanx.transport.shared_memory import SegmentHandle

Backend = Literal["single", "shm", "gloo", "nccl"]


class StoreFile(msgspec.Struct, frozen=True):
    """An empty memfd of the brain that torch uses as the file of its FileStore."""

    pid: int
    fd: int

    @property
    def path(self) -> str:
        """Where another process of the same user and machine opens it."""
        return f"/proc/{self.pid}/fd/{self.fd}"


class GroupSpec(msgspec.Struct, frozen=True):
    """One process group of one epoch. The same for all its ranks, and valid while the `Rendezvous` behind it is open.

    A group whose ranks are on several hosts has no rendezvous, and nothing that it would bring.

    `ranks` are the global ranks of the members, in the group's order: a member's place among them is its rank within
    the group. `timeout_s` limits each wait of each collective, `join_timeout_s` the joining.
    """

    name: str
    backend: Backend
    ranks: tuple[int, ...]
    epoch: int
    timeout_s: float
    join_timeout_s: float
    rendezvous: SegmentHandle | None = None  # None for "single", and if the ranks are not all on one host
    store: StoreFile | None = None  # for "gloo" and "nccl" on one host
    slot_bytes: int = 0  # for "shm": room for one chunk of one rank's data
    # For "shm": up to here every rank adds up everything, above it they share a sum. All must decide alike.
    alone_bytes: int = 0
    # For "shm" and "gloo" between hosts: the source of a broadcast may return before its peers have come.
    runs_ahead: bool = False
    # The ranks agree on each collective before they issue it (agreement.py); on one host, in this memory.
    agrees: bool = False
    agreement: SegmentHandle | None = None

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    @property
    def spans_hosts(self) -> bool:
        """Whether its ranks share no memory: they find each other through an `Exchange`."""
        return self.backend != "single" and self.rendezvous is None


def pick_backend(device_type: str, size: int, one_host: bool) -> Backend:
    """The fastest backend for `size` ranks on devices of `device_type` ("cpu", "cuda")."""
    if size == 1:
        return "single"
    if device_type == "cuda":
        return "nccl"
    return "shm" if one_host else "gloo"
