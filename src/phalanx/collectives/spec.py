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

    `timeout_s` limits the joining and each wait of each collective.
    """

    name: str
    backend: Backend
    size: int
    epoch: int
    timeout_s: float
    rendezvous: SegmentHandle | None = None  # None for "single"
    store: StoreFile | None = None  # for "gloo" and "nccl"
    slot_bytes: int = 0  # for "shm": room for one chunk of one rank's data
    # For "shm": up to here every rank adds up everything, above it they share a sum. All must decide alike.
    alone_bytes: int = 0


def pick_backend(device_type: str, size: int, one_host: bool) -> Backend:
    """The fastest backend for `size` ranks on devices of `device_type` ("cpu", "cuda")."""
    if size == 1:
        return "single"
    if device_type == "cuda":
        return "nccl"
    return "shm" if one_host else "gloo"
