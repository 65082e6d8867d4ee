"""Which part of a matrix each tensor-parallel rank holds: pure arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

from phalanx.errors import ConfigError

ALIGNMENT = 8
"""Parts are multiples of this where the size is: 16 bytes of bfloat16, which matrix units want."""


class Span(NamedTuple):
    """The indices from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        """The span of elements, when each index stands for `factor` of them."""
        return Span(self.start * factor, self.stop * factor)

    def shifted(self, offset: int) -> Span:
        return Span(self.start + offset, self.stop + offset)

    def intersection(self, other: Span) -> Span:
        """What both cover; of size 0 if they do not meet."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


class HeadShard(NamedTuple):
    """A rank's attention heads. Every KV head of a rank serves the same number of its query heads."""

    query: Span
    kv: Span


def split(size: int, num_ranks: int, rank: int) -> Span:
    """Rank's share of `size` indices in rank order. Shares differ by one at most, the first ranks having more."""
    assert 0 <= rank < num_ranks
    share, rest = divmod(size, num_ranks)
    start = rank * share + min(rank, rest)
    return Span(start, start + share + (rank < rest))


class ExpertShare(NamedTuple):
    """Which experts of every layer a rank has, whole: those of one place among the ranks that share them out."""

    rank: int
    num_ranks: int
    num_redundant: int = 0
    """Physical experts of a layer beyond one for each of its experts."""
    is_even: bool = False
    """Whether every rank must have as many, so that any physical expert can become any other."""

    def span(self, num_experts: int) -> Span:
        """This rank's physical experts. Raises ConfigError: there are too few, or not as many for each rank."""
        if num_experts < self.num_ranks:
            raise ConfigError(
                "enable_expert_parallel", True, f"at most {num_experts} ranks for this model: every one needs an expert"
            )
        num_physical, num_ranks = num_experts + self.num_redundant, self.num_ranks
        if (self.is_even and num_physical % num_ranks) or num_physical > num_experts * num_ranks:
            raise ConfigError(
                "num_redundant_experts",
                self.num_redundant,
                f"with the {num_experts} experts of this model it must make a multiple of {num_ranks}, for as many "
                f"ranks, and at most {num_experts * num_ranks}",
            )
        return split(num_physical, num_ranks, self.rank)


def split_columns(size: int, num_ranks: int, rank: int) -> Span:
    """Rank's share of the `size` columns of a matrix, in aligned units where that leaves no rank without any.

    Raises ConfigError: there are fewer columns than ranks.
    """
    if size < num_ranks:
        raise ConfigError("tensor_parallel_size", num_ranks, f"at most {size} for this model, the width of a matrix")
    unit = math.gcd(size, ALIGNMENT)
    while size // unit < num_ranks:
        unit //= 2
    return split(size // unit, num_ranks, rank).scaled(unit)


def shard_heads(num_query_heads: int, num_kv_heads: int, num_ranks: int, rank: int) -> HeadShard:
    """The attention heads of a rank.

    A KV head goes with the group of query heads that attend to it. Up to as many ranks as KV heads share out whole
    groups, unevenly if need be. More ranks than KV heads are themselves shared out to the groups: those of one group
    all hold its KV head and split its query heads. (vLLM replicates KV heads likewise, for even numbers only.)

    Raises ConfigError: there are more ranks than query heads.
    """
    assert num_query_heads % num_kv_heads == 0
    group_size = num_query_heads // num_kv_heads
    if num_ranks > num_query_heads:
        raise ConfigError(
            "tensor_parallel_size",
            num_ranks,
            f"at most {num_query_heads} for this model: every rank needs one of its query heads",
        )
    if num_ranks <= num_kv_heads:
        kv = split(num_kv_heads, num_ranks, rank)
        return HeadShard(query=kv.scaled(group_size), kv=kv)
    for kv_head in range(num_kv_heads):
        sharers = split(num_ranks, num_kv_heads, kv_head)
        if rank < sharers.stop:
            break
    query = split(group_size, sharers.size, rank - sharers.start).shifted(kv_head * group_size)
    return HeadShard(query=query, kv=Span(kv_head, kv_head + 1))


def vocab_part(vocab_size: int, num_ranks: int) -> int:
    """Rows of the vocabulary that every rank holds, the last ones padded: equal parts, so that they can be gathered."""
    return vocab_size if num_ranks == 1 else round_up(-(-vocab_size // num_ranks), ALIGNMENT)


def round_up(size: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-size // unit) * unit
