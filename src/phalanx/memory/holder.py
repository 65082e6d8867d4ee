"""Keeps the memory of workers that may die: weights and KV cache for those that come after them."""

from __future__ import annotations

from contextlib import ExitStack

import msgspec

from phalanx.memory.held import HeldMemory
from phalanx.transport.shared_memory import SegmentHandle, SegmentHold


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
        self._holds: dict[int, dict[int, SegmentHold]] = {}
        """Of each rank, by their nonces: a segment keeps its own whoever holds it."""

    def hold(self, rank: int, told: HeldMemory) -> HeldMemory:
        """Take what a rank's living worker tells to be its memory; returns it as of this process.

        What the rank had before and is not in `told` is let go. A segment that is held already, because the worker has
        it from here, stays. Raises PeerDiedError if the worker is gone, FrameError if it has closed its memory; then
        everything is as it was before.
        """
        before = self._holds.get(rank, {})
        with ExitStack() as undo:
            holds = {
                handle.nonce: before.get(handle.nonce) or undo.enter_context(SegmentHold(handle))
                for handle in told.segments
            }
            undo.pop_all()
        for nonce in before.keys() - holds.keys():
            before[nonce].close()
        self._holds[rank] = holds
        handles: tuple[SegmentHandle, ...] = tuple(holds[handle.nonce].handle for handle in told.segments)
        self._memory[rank] = msgspec.structs.replace(told, segments=handles)
        return self._memory[rank]

    def memory(self, rank: int) -> HeldMemory | None:
        """What a rank's next worker gets; None if nothing is held."""
        return self._memory.get(rank)

    def drop(self, rank: int) -> None:
        """Let go of what a rank has, if anything: it is of no use any more. It is freed when its workers are gone."""
        self._memory.pop(rank, None)
        for hold in self._holds.pop(rank, {}).values():
            hold.close()

    def close(self) -> None:
        """Let go of everything. May be called more than once."""
        for rank in list(self._holds):
            self.drop(rank)

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
