"""What the lines of a formation leave to each other: weights and KV cache that outlive the ranks that made them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from phalanx.memory.held import HeldMemory


class RankHolder(Protocol):
    """Keeps ranks' memory, as memory.holder.Holder does on one host."""

    def hold(self, rank: int, told: HeldMemory) -> HeldMemory:
        """Take what a living rank has; as the next one gets it."""

    def memory(self, rank: int) -> HeldMemory | None:
        """What a rank's next worker gets; None if nothing is held."""

    def drop(self, rank: int) -> None:
        """Let go of what a rank has, if anything."""


class FormationMemory:
    """Held until `close`. For any thread."""

    def __init__(self, num_ranks: int, holder: RankHolder, *, holds_weights: bool) -> None:
        """`holds_weights`: whether what ranks have to leave are all their weights, beside the KV cache."""
        self._num_ranks = num_ranks
        self._holds_weights = holds_weights
        self._is_trusted = True
        self._holder = holder
        self._holding = threading.Lock()
        self._shared: set[int] = set()
        """Nonces of segments that another engine's ranks may compute with, too."""
        self.shares_weights = False
        """Whether ranks of another engine may compute with the memory that these ranks compute with: then nobody may
        write to it. So it stays when that is not held any more, until ranks tell of other memory."""

    def take(self, told: Mapping[int, HeldMemory]) -> None:
        """From now on it is what these living ranks have; nothing, if one of them has nothing to leave.

        Raises PeerDiedError or FrameError if one has just ended.
        """
        if self.follow(told):
            self._is_trusted = True

    def follow(self, told: Mapping[int, HeldMemory]) -> bool:
        """The same ranks have this by now: what they have given back is let go of. Whether they have anything.

        Says nothing about whether it is trusted. Raises as `take`.
        """
        with self._holding:
            if len(told) < self._num_ranks:
                self._drop()
                return False
            try:
                for rank, memory in told.items():
                    self._holder.hold(rank, memory)
            except BaseException:
                self._drop()  # of several lines, it is of none
                raise
            self.shares_weights = not self._shared.isdisjoint(_nonces(told.values()))
            return True

    def of_ranks(self) -> dict[int, HeldMemory]:
        """What a line that is to go on gets; empty if it has to begin anew."""
        with self._holding:
            found = {rank: self._holder.memory(rank) for rank in range(self._num_ranks)}
            return {rank: memory for rank, memory in found.items() if memory is not None}

    def share(self) -> tuple[HeldMemory, ...] | None:
        """By rank, weights for ranks of another engine on this host; None where they are not all there."""
        if not self.holds_weights:
            return None
        weights = tuple(one.part(partial(_is_weight, one)) for one in self.of_ranks().values())
        self.adopt(weights)
        return weights

    def borrow(self, weights: Sequence[HeldMemory]) -> None:
        """What another engine has given is for the first line here, too.

        Raises PeerDiedError or FrameError if it has let go of it by now; then there is nothing.
        """
        self._shared.update(_nonces(weights))
        self.follow(dict(enumerate(weights)))

    def adopt(self, weights: Sequence[HeldMemory]) -> None:
        """From now on ranks of this and of another engine may have these weights in common."""
        self._shared.update(_nonces(weights))
        self.shares_weights = True

    @property
    def is_whole(self) -> bool:
        """Whether a line can go on with it."""
        return self._is_trusted and len(self.of_ranks()) == self._num_ranks

    def begin_change(self) -> None:
        """Ranks write to their weights: until `end_change` no other ones are to go on with what is there."""
        self._is_trusted = False

    def end_change(self) -> None:
        """All of them have written all of it. So has who is new since then."""
        self._is_trusted = True

    @property
    def holds_weights(self) -> bool:
        """Whether all weights are in it, as they are by now, and none has to be read."""
        return self._holds_weights and self.is_whole

    def drop(self) -> None:
        """It is of no use any more."""
        with self._holding:
            self._drop()

    def close(self) -> None:
        """May be called more than once."""
        self.drop()

    def _drop(self) -> None:
        for rank in range(self._num_ranks):
            self._holder.drop(rank)


def _nonces(memory: Iterable[HeldMemory]) -> set[int]:
    return {handle.nonce for one in memory for handle in one.segments}


def _is_weight(memory: HeldMemory, name: str) -> bool:
    return name not in memory.cache
