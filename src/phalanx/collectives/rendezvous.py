"""What the brain holds while the ranks of a group find each other. No torch here."""

from __future__ import annotations

import os
from contextlib import ExitStack
from types import TracebackType

from phalanx.collectives.layout import Layout
from phalanx.collectives.spec import Backend, GroupSpec, StoreFile
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

# Two slots a rank stay in its core's second-level cache; larger tensors go in chunks of this.
_SLOT_BYTES = 512 * 1024
# What the source may be ahead of its peers: 2048 tokens of 4096 numbers of two bytes. Memory that is never written is
# never taken.
_AHEAD_SLOT_BYTES = 16 * 1024 * 1024
# A shared sum has a second meeting and less to add. With a core each it is the quicker one from here on, for four ranks
# and for eight; ranks that share cores pay more for a meeting. Two ranks never share: each would add half as much, and
# copy as much more.
_ALONE_BYTES_WITH_A_CORE = 32 * 1024
_ALONE_BYTES_SHARING = 256 * 1024


class Rendezvous:
    """The memory through which ranks of one host join one group: `spec` tells them how.

    Keep it open until every rank has joined. After that it may be closed: the ranks hold all that they need, and the
    memory goes when the last of them does.
    """

    def __init__(self, spec: GroupSpec, ownership: ExitStack) -> None:
        self.spec = spec
        self._ownership = ownership

    def close(self) -> None:
        """Drop the memory. May be called more than once."""
        self._ownership.close()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_rendezvous(
    name: str,
    backend: Backend,
    ranks: tuple[int, ...],
    epoch: int,
    timeout_s: float,
    join_timeout_s: float,
    *,
    runs_ahead: bool = False,
    agrees: bool = False,
) -> Rendezvous:
    """Prepare a group of ranks of this host; see `GroupSpec`. Each call is a new group.

    With `runs_ahead` the source of a broadcast may return before its peers have come: it waits for them in its next
    operation, which then also raises what was wrong with this one. Only for groups over shared memory; over Gloo the
    source waits, and over NCCL the host never does. With `agrees` the ranks can agree on what they issue, which is for
    the caller of `join` to have them do (agreement.py).
    """
    size = len(ranks)
    if backend == "single":
        assert size == 1, ranks
        return Rendezvous(GroupSpec(name, backend, ranks, epoch, timeout_s, join_timeout_s), ExitStack())
    with ExitStack() as undo:
        slot_bytes = 0
        if backend == "shm":
            slot_bytes = _AHEAD_SLOT_BYTES if runs_ahead else _SLOT_BYTES
        label = f"group {name}, epoch {epoch}"
        segment = undo.enter_context(SharedSegment.create(Layout(size, slot_bytes).size_bytes, label))
        store = None if backend == "shm" else _create_store(undo, label)
        agreement = _create_agreement(undo, size, label) if agrees else None
        spec = GroupSpec(
            name,
            backend,
            ranks,
            epoch,
            timeout_s,
            join_timeout_s,
            segment.handle,
            store,
            slot_bytes,
            _alone_bytes(size),
            runs_ahead,
            agrees,
            agreement,
        )
        return Rendezvous(spec, undo.pop_all())


def _alone_bytes(size: int) -> int:
    if size <= 2:
        return _SLOT_BYTES
    return _ALONE_BYTES_WITH_A_CORE if size <= len(os.sched_getaffinity(0)) else _ALONE_BYTES_SHARING


def _create_agreement(ownership: ExitStack, size: int, label: str) -> SegmentHandle:
    segment = SharedSegment.create(Layout(size, 0).size_bytes, f"agreement of {label}")
    return ownership.enter_context(segment).handle


def _create_store(ownership: ExitStack, label: str) -> StoreFile:
    fd = os.memfd_create(f"phalanx:store of {label}", os.MFD_CLOEXEC)
    ownership.callback(os.close, fd)
    return StoreFile(os.getpid(), fd)
