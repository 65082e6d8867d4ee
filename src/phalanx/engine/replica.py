"""What a replica has for itself: a queue, blocks and what they hold, and what its workers have not been told yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.block_pool import BlockPool, Blocks
from phalanx.engine.prefix_cache import ROOT, PrefixCache, extend_digests
from phalanx.engine.request import Request
from phalanx.protocol.columns import Ints, ints
from phalanx.protocol.worker import NewRequest


class Replica:
    """Its running requests are rows of the table that all replicas share."""

    def __init__(self, index: int, *, num_blocks: int, block_size: int, is_prefix_caching: bool) -> None:
        self.index = index
        self.cache = PrefixCache(num_blocks)
        self.pool = BlockPool(num_blocks, self.cache)
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self._block_size = block_size
        self._is_prefix_caching = is_prefix_caching
        self._dropped: list[int] = []
        self._new: dict[int, NewRequest] = {}

    def find_cached(self, request: Request) -> Blocks:
        """Blocks that hold the beginning of the request's tokens. Never all: the last token's logits are wanted."""
        if not self._is_prefix_caching:
            return np.empty(0, dtype=np.int32)
        num_full = (len(request.token_ids) - 1) // self._block_size
        extend_digests(request.digests, request.token_ids, self._block_size, num_full)
        return np.array(self.cache.find(request.digests[:num_full]), dtype=np.int32)

    def take_tail(self, request: Request, num_full: int) -> tuple[Blocks, int]:
        """The block after so many full ones that were found, if it holds the tokens after these; and how many.

        Never all, as with `find_cached`.
        """
        first = num_full * self._block_size
        rest = request.token_ids[first : first + self._block_size - 1]
        found = self.cache.find_tail(request.digests[num_full - 1] if num_full else ROOT, rest)
        if found is None:
            return np.empty(0, dtype=np.int32), 0
        block, num_tokens = found
        self.pool.take_tail(block)
        return np.array([block], dtype=np.int32), min(num_tokens, len(request.token_ids) - 1 - first)

    def keep_tail(self, request: Request, token_ids: NDArray[np.int32], blocks: Blocks) -> None:
        """Let who goes on after a request that ends find its last block, if that is not full."""
        num_full, num_rest = divmod(len(token_ids), self._block_size)
        if self._is_prefix_caching and num_rest:
            parent = request.digests[num_full - 1] if num_full else ROOT
            self.cache.insert_tail(parent, token_ids[num_full * self._block_size :], int(blocks[num_full]))

    def requeue(self, requests: Iterable[Request]) -> None:
        """Let requests wait again, among those that wait, in order of arrival."""
        waiting = sorted((*requests, *self.waiting.values()), key=lambda request: request.arrival)
        self.waiting = OrderedDict((request.request_id, request) for request in waiting)

    def tell_dropped(self, slot: int) -> None:
        """The next plan is to say that the slot is free, unless no plan has said yet that somebody has it."""
        if self._new.pop(slot, None) is None:
            self._dropped.append(slot)

    def tell_new(self, request: NewRequest) -> None:
        """The next plan is to say who has the slot now."""
        self._new[request.slot] = request

    def tell_nothing(self) -> None:
        """Those who were to be told are gone, and who comes after them knows nothing."""
        self._dropped, self._new = [], {}

    def take_dropped(self) -> Ints:
        """Slots that the next plan is to call free."""
        dropped, self._dropped = ints(self._dropped), []
        return dropped

    def take_new(self) -> tuple[NewRequest, ...]:
        """Requests that the next plan is to bring."""
        new, self._new = tuple(self._new.values()), {}
        return new
