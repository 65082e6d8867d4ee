from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phalanx.engine.block_pool import BlockPool, Blocks
from phalanx.engine.prefix_cache import ROOT, PrefixCache

NUM_BLOCKS = 6


def blocks(*ids: int) -> Blocks:
    return np.array(ids, dtype=np.int32)


def test_empty_blocks_are_taken_before_idle_ones() -> None:
    cache = PrefixCache(3)
    pool = BlockPool(3, cache)
    cached = pool.take(1)
    cache.insert(b"a", int(cached[0]))
    pool.release(cached)
    assert pool.take(2).tolist() == [1, 2]
    assert cache.find([b"a"]) == [0]
    assert pool.take(1).tolist() == [0]
    assert cache.find([b"a"]) == [], "it is about to be overwritten"


def test_who_takes_a_tail_has_it_for_himself() -> None:
    cache = PrefixCache(3)
    pool = BlockPool(3, cache)
    (tail,) = pool.take(1)
    cache.insert_tail(ROOT, np.array([4], dtype=np.int32), int(tail))
    pool.release(blocks(tail))
    assert pool.num_free == 3
    pool.take_tail(int(tail))
    assert pool.num_free == 2
    assert cache.find_tail(ROOT, np.array([4], dtype=np.int32)) is None
    pool.release(blocks(tail))
    assert pool.take(3).tolist() == [0, 1, 2]


def test_the_end_of_the_sequence_that_was_idle_longest_is_evicted_first() -> None:
    cache = PrefixCache(4)
    pool = BlockPool(4, cache)
    first, second = pool.take(2), pool.take(2)
    for digest, block in zip((b"a", b"b", b"c", b"d"), [*first, *second], strict=True):
        cache.insert(digest, int(block))
    pool.release(second)
    pool.release(first)
    assert pool.take(3).tolist() == [first[1], second[0], second[1]]  # the last one evicted lies on top
    assert cache.find([b"a"]) == [first[0]]


def test_a_shared_block_is_free_when_its_last_holder_is_gone() -> None:
    cache = PrefixCache(2)
    pool = BlockPool(2, cache)
    held = pool.take(1)
    cache.insert(b"a", int(held[0]))
    assert pool.num_idle(held) == 0
    pool.share(held)
    pool.release(held)
    assert pool.num_free == 1
    pool.release(held)
    assert (pool.num_free, pool.num_idle(held)) == (2, 1)
    pool.share(held)
    assert pool.num_free == 1
    assert pool.take(1).tolist() == [1], "a shared block is not evicted"


def test_after_a_reset_idle_blocks_are_empty_and_held_ones_will_be() -> None:
    cache = PrefixCache(3)
    pool = BlockPool(3, cache)
    idle, held = pool.take(1), pool.take(1)
    cache.insert(b"a", int(idle[0]))
    cache.insert(b"b", int(held[0]))
    pool.release(idle)
    pool.reset_cache()
    assert cache.find([b"a"]) == cache.find([b"b"]) == []
    assert pool.num_free == 2
    pool.release(held)
    assert sorted(pool.take(3).tolist()) == [0, 1, 2]


def test_what_is_not_there_cannot_be_taken_or_released() -> None:
    pool = BlockPool(2, PrefixCache(2))
    with pytest.raises(AssertionError, match="3 blocks are asked for, 2 are free"):
        pool.take(3)
    taken = pool.take(1)
    pool.release(taken)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(taken)


class Pool(RuleBasedStateMachine):
    """Against a plain count of the holders of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_BLOCKS)
        self.pool = BlockPool(NUM_BLOCKS, self.cache)
        self.held: list[list[int]] = []
        self.names = iter(range(10_000))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(0, self.pool.num_free))
        taken = self.pool.take(num_blocks).tolist()
        in_use = {block for sequence in self.held for block in sequence}
        assert len(set(taken)) == num_blocks
        assert not in_use & set(taken)
        assert not self.cache.is_cached_B[taken].any()
        self.held.append(taken)

    @rule(data=st.data())
    def cache_one(self, data: st.DataObject) -> None:
        candidates = [block for sequence in self.held for block in sequence if not self.cache.is_cached_B[block]]
        if candidates:
            self.cache.insert(str(next(self.names)).encode(), data.draw(st.sampled_from(candidates)))

    @rule()
    def reset_cache(self) -> None:
        self.pool.reset_cache()
        assert not self.cache.entries()

    @precondition(lambda self: self.cache.entries())
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        found = data.draw(st.lists(st.sampled_from(sorted(self.cache.entries().values())), unique=True))
        self.pool.share(blocks(*found))
        self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.held))
        self.held.remove(sequence)
        self.pool.release(blocks(*sequence))

    @invariant()
    def every_block_is_held_or_free(self) -> None:
        in_use = {block for sequence in self.held for block in sequence}
        assert self.pool.num_free == NUM_BLOCKS - len(in_use)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


def test_blocks_that_are_set_aside_come_back_empty() -> None:
    cache = PrefixCache(8)
    pool = BlockPool(8, cache)
    held, cached, freed = pool.take(2), pool.take(2), pool.take(2)
    cache.insert(b"a", int(cached[0]))
    pool.release(cached)
    pool.release(freed)
    aside = np.array([held[0], cached[0], freed[1]], dtype=np.int32)
    pool.set_aside(aside)
    assert pool.num_aside == 3 and pool.num_free == 8 - 3 - 1
    assert not cache.find([b"a"])
    taken = pool.take(pool.num_free)
    assert not np.isin(taken, aside).any() and int(held[1]) not in taken
    pool.restore()
    assert pool.num_aside == 0 and sorted(pool.take(3).tolist()) == sorted(aside.tolist())


def test_only_what_nobody_else_has_or_finds_may_be_written() -> None:
    cache = PrefixCache(4)
    pool = BlockPool(4, cache)
    held = pool.take(3)
    cache.insert(b"a", int(held[0]))
    pool.share(held[1:2])
    assert pool.own(held).tolist() == held[2:].tolist()
