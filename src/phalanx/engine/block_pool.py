"""The blocks of the KV cache: who holds them, and which are taken next."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.prefix_cache import PrefixCache

Blocks = NDArray[np.int32]
"""Block ids, in the order of the tokens that they hold."""


class BlockPool:
    """Every block is in one of four states: held by one request or more, *empty*, *idle*, or *set aside*.

    An idle block is held by nobody but can still be found by its digest. Blocks are taken from the empty ones first,
    then from the idle ones, the longest idle first. Those that are set aside are not taken: somebody may write to them
    who is about to end.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self._cache = cache
        self._num_holders_B = np.zeros(num_blocks, dtype=np.int32)
        # A stack; the lowest block is on top.
        self._empty = np.arange(num_blocks, dtype=np.int32)[::-1].copy()
        self._num_empty = num_blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._aside = np.empty(0, dtype=np.int32)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: the empty and the idle ones."""
        return self._num_empty + len(self._idle)

    def num_idle(self, blocks: Blocks) -> int:
        """How many of these would no longer be free if they were shared."""
        return int(np.count_nonzero(self._num_holders_B[blocks] == 0))

    def take(self, num_blocks: int) -> Blocks:
        """Blocks to write to, held once. There must be that many free ones."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks are asked for, {self.num_free} are free"
        if num_blocks > self._num_empty:
            self._evict(num_blocks - self._num_empty)
        self._num_empty -= num_blocks
        blocks = self._empty[self._num_empty : self._num_empty + num_blocks][::-1].copy()
        self._num_holders_B[blocks] = 1
        return blocks

    def share(self, blocks: Blocks) -> None:
        """One more holder for blocks that the prefix cache has found. They are not to be written."""
        for block in blocks[self._num_holders_B[blocks] == 0].tolist():
            del self._idle[block]
        self._num_holders_B[blocks] += 1

    def take_tail(self, block: int) -> None:
        """Take this one, which the prefix cache has found, to write to it. Nobody else has a tail."""
        del self._idle[block]
        self._cache.forget(block)
        self._num_holders_B[block] = 1

    def release(self, blocks: Blocks) -> None:
        """One holder less for the blocks of one request."""
        self._num_holders_B[blocks] -= 1
        holders = self._num_holders_B[blocks]
        assert not (holders < 0).any(), "a block was released twice"
        free = blocks[holders == 0]
        is_cached = self._cache.is_cached_B[free]
        self._push_empty(free[~is_cached])
        # The end of a sequence goes first: without its beginning it could not be found anyway.
        self._idle.update(dict.fromkeys(free[is_cached][::-1].tolist()))

    def own(self, blocks: Blocks) -> Blocks:
        """Those of one request's blocks that nobody else has or can find, so that it may have written to them."""
        own: Blocks = blocks[(self._num_holders_B[blocks] == 1) & ~self._cache.is_cached_B[blocks]]
        return own

    def set_aside(self, blocks: Blocks) -> None:
        """Have these given to nobody before `restore`. Who holds one of them holds it no more."""
        self._num_holders_B[blocks] = 0
        for block in blocks[self._cache.is_cached_B[blocks]].tolist():
            self._idle.pop(block, None)
            self._cache.forget(block)
        empty = self._empty[: self._num_empty]
        still_empty = empty[~np.isin(empty, blocks)]
        self._num_empty = len(still_empty)
        self._empty[: self._num_empty] = still_empty
        self._aside = np.union1d(self._aside, blocks)

    def restore(self) -> None:
        """Blocks that were set aside are empty now."""
        self._push_empty(self._aside)
        self._aside = self._aside[:0]

    @property
    def num_aside(self) -> int:
        """Blocks that are set aside."""
        return len(self._aside)

    def reset_cache(self) -> None:
        """Forget what every block holds: the idle ones are empty now, and the held ones once they are released."""
        self._cache.clear()
        self._push_empty(np.array(list(self._idle), dtype=np.int32))
        self._idle.clear()

    def _evict(self, num_blocks: int) -> None:
        evicted = [self._idle.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in evicted:
            self._cache.forget(block)
        self._push_empty(np.array(evicted, dtype=np.int32))

    def _push_empty(self, blocks: Blocks) -> None:
        self._empty[self._num_empty : self._num_empty + len(blocks)] = blocks
        self._num_empty += len(blocks)
