"""Keeps the memory of workers that may die: weights and KV cache for those that come after them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from contextlib import ExitStack

import msgspec

from phalanx.memory.held import HeldMemory, PieceHandle
from phalanx.transport.descriptors import DescriptorOffers, take_descriptors
from phalanx.transport.shared_memory import SegmentHold


class PieceHold:
    """Keeps a piece of a GPU's memory alive, without CUDA. `handle` is how others get it from now on."""

    def __init__(self, offers: DescriptorOffers, fd: int, told: PieceHandle) -> None:
        """`fd` is closed with it."""
        self._offers = offers
        self.handle = msgspec.structs.replace(told, descriptor=offers.offer(fd, told.descriptor.label))

    def close(self) -> None:
        """Let go of it. May be called more than once."""
        self._offers.withdraw(self.handle.descriptor)


class Holder:
    """What the ranks of a formation have on this host, alive until `close`. It is not mapped, so it costs descriptors
    and nothing else. Belongs to one thread.

    A line's workers answer AllocateCache with what there is to hold (`Allocated`). From `hold` on, a worker of another
    line that gets what `memory` gives, as the `held` of its WorkerSpec, has the same tensors with the same contents,
    whether the first one lives or not. Two lines may have them at a time, but only one may step or call methods: before
    another one does, its processes must be gone. What a worker extension has written to weights counts for the next
    line, also for one that has taken them over earlier. A line that died while such a method ran may have written half
    of it.
    """

    def __init__(self) -> None:
        self._memory: dict[int, HeldMemory] = {}
        self._segments: dict[int, dict[int, SegmentHold]] = {}
        """Of each rank, by their nonces: a segment keeps its own whoever holds it."""
        self._pieces: dict[int, dict[int, PieceHold]] = {}
        self._offers: DescriptorOffers | None = None
        """To those who are to have the pieces."""

    def hold(self, rank: int, told: HeldMemory) -> HeldMemory:
        """Take what a rank's living worker tells to be its memory; returns it as of this process.

        What the rank had before and is not in `told` is let go. A segment that is held already, because the worker has
        it from here, stays. Raises PeerDiedError if the worker is gone, FrameError if it has closed its memory,
        DeadlineError if it does not hand it out; then everything is as it was before.
        """
        with ExitStack() as undo:
            segments = self._hold_segments(self._segments.get(rank, {}), told, undo)
            pieces = self._hold_pieces(self._pieces.get(rank, {}), told, undo)
            undo.pop_all()
        _close_others(self._segments.get(rank, {}), segments)
        _close_others(self._pieces.get(rank, {}), pieces)
        self._segments[rank], self._pieces[rank] = segments, pieces
        self._memory[rank] = msgspec.structs.replace(
            told,
            segments=tuple(segments[handle.nonce].handle for handle in told.segments),
            pieces=tuple(pieces[handle.nonce].handle for handle in told.pieces),
        )
        return self._memory[rank]

    def memory(self, rank: int) -> HeldMemory | None:
        """What a rank's next worker gets; None if nothing is held."""
        return self._memory.get(rank)

    def drop(self, rank: int) -> None:
        """Let go of what a rank has, if anything: it is of no use any more. It is freed when its workers are gone."""
        self._memory.pop(rank, None)
        _close_others(self._segments.pop(rank, {}), kept=())
        _close_others(self._pieces.pop(rank, {}), kept=())

    def close(self) -> None:
        """Let go of everything. May be called more than once."""
        for rank in list(self._memory):
            self.drop(rank)
        if self._offers is not None:
            self._offers.close()

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold_segments(
        self, before: dict[int, SegmentHold], told: HeldMemory, undo: ExitStack
    ) -> dict[int, SegmentHold]:
        return {
            handle.nonce: before.get(handle.nonce) or undo.enter_context(SegmentHold(handle))
            for handle in told.segments
        }

    def _hold_pieces(self, before: dict[int, PieceHold], told: HeldMemory, undo: ExitStack) -> dict[int, PieceHold]:
        new = [handle for handle in told.pieces if handle.nonce not in before]
        held = {handle.nonce: before[handle.nonce] for handle in told.pieces if handle.nonce in before}
        for handle, fd in zip(new, take_descriptors([handle.descriptor for handle in new]), strict=True):
            self._offers = self._offers or DescriptorOffers()
            held[handle.nonce] = PieceHold(self._offers, fd, handle)
            undo.callback(held[handle.nonce].close)
        return held


def _close_others(before: Mapping[int, SegmentHold] | Mapping[int, PieceHold], kept: Container[int]) -> None:
    for nonce, hold in before.items():
        if nonce not in kept:
            hold.close()
