"""Which replica gets a request: one that has its beginning in its prefix cache, unless that one is much busier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.prefix_cache import extend_digests

SLACK = 4
"""A replica may have so many more requests than the one with the fewest, and still get one whose beginning it has."""
MAX_DIGESTS = 1 << 17
"""Of blocks that a router remembers, of all replicas together: some 25 MB."""


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
        self._given: dict[int, _Recent] = {}

    def pick(self, token_ids: Sequence[int] | NDArray[np.int32], num_requests: Mapping[int, int]) -> int:
        """The replica for a request. `num_requests` are those that each has now, of all that take more."""
        digests = self._digests(np.asarray(token_ids, dtype=np.int32))
        for new in num_requests.keys() - self._given.keys():
            self._given[new] = _Recent()
        replicas = list(num_requests)
        cached = [self._given[replica].num_leading(digests) * self._block_size for replica in replicas]
        replica = replicas[choose(cached, list(num_requests.values()))]
        self._given[replica].note(digests, MAX_DIGESTS // len(self._given))
        return replica

    def forget(self, replica: int) -> None:
        """It is gone, or has a new cache."""
        self._given.pop(replica, None)

    def _digests(self, token_ids: NDArray[np.int32]) -> list[bytes]:
        digests: list[bytes] = []
        extend_digests(digests, token_ids, self._block_size, len(token_ids) // self._block_size)
        return digests


class _Recent:
    """Digests of the blocks that one replica was given, the latest first to stay."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def num_leading(self, digests: Sequence[bytes]) -> int:
        """Of a request's first blocks, how many are here."""
        return next((i for i, digest in enumerate(digests) if digest not in self._digests), len(digests))

    def note(self, digests: Sequence[bytes], most: int) -> None:
        """They were given now; of all, `most` are kept."""
        # The last block first: without its beginning the rest of a request is of no use.
        for digest in reversed(digests):
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        while len(self._digests) > most:
            self._digests.popitem(last=False)
