"""Which replica gets a request: one that has its beginning in its prefix cache, unless that one is much busier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.prefix_cache import extend_digests

SLACK = 4
"""A replica may have so many more requests than the one with the fewest, and still get one whose beginning it has."""
MAX_DIGESTS = 1 << 17
"""Of blocks that a router remembers: some 20 MB."""


def choose(num_cached: Sequence[int], num_requests: Sequence[int]) -> int:
    """The replica that suits a request best.

    `num_cached` are the request's tokens in each replica's cache. Of those that are not much busier than the idlest it
    is the one with most of them; between equals the idlest. (SGLang's router weighs cache and load likewise.)
    """
    limit = min(num_requests) + SLACK
    candidates = [replica for replica, count in enumerate(num_requests) if count <= limit]
    return max(candidates, key=lambda replica: (num_cached[replica], -num_requests[replica]))


class Router:
    """For replicas in other processes: takes what each was given lately for what its cache holds."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._replica_of: OrderedDict[bytes, int] = OrderedDict()

    def pick(self, token_ids: Sequence[int], num_requests: Sequence[int | None]) -> int:
        """The replica for a request. `num_requests` are those that each has now; None for one that takes no more."""
        digests = self._digests(np.array(token_ids, dtype=np.int32))
        alive = [replica for replica, count in enumerate(num_requests) if count is not None]
        cached = [self._num_cached(digests, replica) for replica in alive]
        replica = alive[choose(cached, [count for count in num_requests if count is not None])]
        self._note(digests, replica)
        return replica

    def _digests(self, token_ids: NDArray[np.int32]) -> list[bytes]:
        digests: list[bytes] = []
        extend_digests(digests, token_ids, self._block_size, len(token_ids) // self._block_size)
        return digests

    def _num_cached(self, digests: Sequence[bytes], replica: int) -> int:
        for i, digest in enumerate(digests):
            if self._replica_of.get(digest) != replica:
                return i * self._block_size
        return len(digests) * self._block_size

    def _note(self, digests: Sequence[bytes], replica: int) -> None:
        for digest in digests:
            self._replica_of[digest] = replica
            self._replica_of.move_to_end(digest)
        while len(self._replica_of) > MAX_DIGESTS:
            self._replica_of.popitem(last=False)
