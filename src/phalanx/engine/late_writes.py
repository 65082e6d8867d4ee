"""Blocks of the KV cache that ranks may still write to which are about to end: others need not wait for their ends.

Ranks that are being ended may yet carry out what they were sent: the steps under way, which are forgotten. Where such a
step writes is known: behind what is computed of each request that was in it. Those blocks are set aside until the ranks
are gone. Who has one of them gets another one instead, with a copy of what is computed; nobody who ends writes to that,
unless it was to make such a copy itself, and has not shown by a step that it has: so the targets of those are set aside
in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from phalanx.engine.block_pool import Blocks
from phalanx.engine.replica import Replica
from phalanx.engine.request import Counts, Running, Slots
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.worker import BlockCopies, CopyBlocks


class _Left(NamedTuple):
    """What a request had that ended, or gave way, while it was in steps under way."""

    last_step: int
    replica: int
    blocks: Blocks


class LateWrites:
    """For the use of a scheduler."""

    def __init__(self, replicas: Sequence[Replica], running: Running) -> None:
        self._replicas = replicas
        self._running = running
        self._left: list[_Left] = []
        self._copies: list[CopyBlocks] = []
        self._sent: list[CopyBlocks] = []
        """Those that ranks may not have carried out by now, whether anybody needs them or not."""

    @property
    def copies(self) -> tuple[CopyBlocks, ...]:
        """What ranks have to do in turn before the next step. So have those after them, until a step is committed."""
        return tuple(self._copies)

    @property
    def num_aside(self) -> int:
        """Blocks that are set aside."""
        return sum(replica.pool.num_aside for replica in self._replicas)

    def leave(self, last_step: int, replica: Replica, blocks: Blocks) -> None:
        """A request goes that has these blocks, and steps under way, up to `last_step`, write for it."""
        self._left.append(_Left(last_step, replica.index, replica.pool.own(blocks)))

    def committed(self, step: int) -> None:
        """Every rank has carried this one out, and what came before it."""
        if self._left or self._sent:
            self._left = [one for one in self._left if one.last_step > step]
            self._copies, self._sent = [], []

    def nobody_writes(self) -> None:
        """The ranks that were sent steps and copies are gone, or set aside is what they write to."""
        self._left, self._sent = [], list(self._copies)

    def forget_copies(self) -> None:
        """What was to be copied is lost."""
        self._copies = []

    def set_aside(self, slots: Collection[int]) -> bool:
        """Set aside what steps under way write to, those of `slots` among them, which are taken back already.

        False, and nothing has changed, if there are too few free blocks for that.
        """
        late_P = self._written_late(slots)
        found_P = [self._running.find_blocks(p, late) for p, late in enumerate(late_P)]
        for replica, late, (slots_N, _) in zip(self._replicas, late_P, found_P, strict=True):
            if len(slots_N) > replica.pool.num_free - replica.pool.num_idle(late):
                return False
        copies = tuple(
            self._replace(replica, late, *found)
            for replica, late, found in zip(self._replicas, late_P, found_P, strict=True)
        )
        if any(one.sources for one in copies):
            self._copies.append(CopyBlocks(copies))
        return True

    def restore(self) -> bool:
        """Those who were about to end are gone. False if blocks are needed still: what they hold is to be copied."""
        if self._copies and self._running.occupied():
            return False
        self._copies = []
        for replica in self._replicas:
            replica.pool.restore()
        return True

    def _written_late(self, slots: Collection[int]) -> list[Blocks]:
        """By replica, in no order."""
        running = self._running
        late_P: list[list[Blocks]] = [[] for _ in self._replicas]
        for slot in slots:
            first = running.num_computed_S[slot] // running.block_size
            late_P[running.replica_S[slot]].append(running.block_ids_SB[slot, first : running.num_blocks_S[slot]])
        for left in self._left:
            late_P[left.replica].append(left.blocks)
        for sent in self._sent:
            for late, copies in zip(late_P, sent.copies, strict=True):
                late.append(as_ints(copies.targets))
        return [np.unique(np.concatenate(late)) if late else np.empty(0, dtype=np.int32) for late in late_P]

    def _replace(self, replica: Replica, late: Blocks, slots_N: Slots, places_N: Counts) -> BlockCopies:
        running = self._running
        sources_N = running.block_ids_SB[slots_N, places_N]
        replica.pool.set_aside(late)
        targets_N = replica.pool.take(len(sources_N))
        running.replace_blocks(slots_N, places_N, targets_N)
        is_filled_N = places_N * running.block_size < running.num_computed_S[slots_N]
        return BlockCopies(ints(sources_N[is_filled_N]), ints(targets_N[is_filled_N]))
