from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine.prefix_cache import DIGEST_BYTES, ROOT, PrefixCache, block_digest, extend_digests

BLOCK_SIZE = 4


def digests_of(tokens: list[int], num_blocks: int) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, np.array(tokens, dtype=np.int32), BLOCK_SIZE, num_blocks)
    return digests


@given(st.lists(st.integers(0, 2), min_size=8, max_size=8), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_a_digest_stands_for_all_tokens_up_to_the_end_of_its_block(a: list[int], b: list[int]) -> None:
    pairs = zip(digests_of(a, 2), digests_of(b, 2), strict=True)
    assert [x == y for x, y in pairs] == [a[:4] == b[:4], a == b]


def test_digests_can_be_extended_step_by_step() -> None:
    tokens = np.arange(12, dtype=np.int32)
    digests: list[bytes] = []
    for num_blocks in (1, 1, 3):
        extend_digests(digests, tokens, BLOCK_SIZE, num_blocks)
    assert digests == digests_of(list(range(12)), 3)
    assert digests[0] == block_digest(ROOT, tokens[:4].tobytes())
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}


def test_a_block_that_is_not_full_has_no_digest() -> None:
    with pytest.raises(AssertionError, match="only full blocks"):
        digests_of([1, 2, 3], 1)


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(8)
    a, b, c = digests_of(list(range(12)), 3)
    cache.insert(a, 5)
    cache.insert(c, 6)
    assert cache.find([a, b, c]) == [5]
    cache.insert(b, 2)
    assert cache.find([a, b, c]) == [5, 2, 6]
    assert cache.find([b]) == [2]
    assert cache.find([]) == []


def test_of_two_blocks_with_the_same_content_the_first_is_found() -> None:
    cache = PrefixCache(8)
    (digest,) = digests_of([1, 2, 3, 4], 1)
    cache.insert(digest, 5)
    cache.insert(digest, 6)
    assert cache.find([digest]) == [5]
    assert cache.is_cached_B.nonzero()[0].tolist() == [5]


def test_nothing_is_found_after_all_is_forgotten_and_blocks_can_be_filled_again() -> None:
    cache = PrefixCache(8)
    a, b = digests_of(list(range(8)), 2)
    cache.insert(a, 5)
    cache.insert(b, 6)
    cache.clear()
    assert cache.find([a]) == []
    assert not cache.is_cached_B.any()
    cache.insert(a, 6)
    assert cache.entries() == {a: 6}


def test_a_forgotten_block_is_not_found_and_can_be_filled_again() -> None:
    cache = PrefixCache(8)
    a, b = digests_of(list(range(8)), 2)
    cache.insert(a, 5)
    with pytest.raises(AssertionError, match="written twice"):
        cache.insert(b, 5)
    cache.forget(5)
    assert cache.find([a]) == []
    assert not cache.is_cached_B.any()
    cache.insert(b, 5)
    assert cache.entries() == {b: 5}


def test_of_tails_the_one_with_the_most_tokens_is_found() -> None:
    cache, tokens = PrefixCache(8), np.arange(10, dtype=np.int32)
    assert cache.find_tail(ROOT, tokens[:3]) is None
    cache.insert_tail(ROOT, tokens[:1], 3)
    cache.insert_tail(ROOT, tokens[:2], 5)
    assert cache.find_tail(ROOT, tokens[:3]) == (5, 2)
    assert cache.find_tail(b"another" + ROOT, tokens[:3]) is None
    assert cache.find_tail(ROOT, tokens[1:3]) is None
    cache.forget(5)
    assert cache.find_tail(ROOT, tokens[:3]) == (3, 1)
    cache.clear()
    assert cache.find_tail(ROOT, tokens[:3]) is None
