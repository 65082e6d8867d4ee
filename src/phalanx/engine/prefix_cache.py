"""Finds KV cache blocks by what they hold: a hash chained over a sequence's blocks.

As in vLLM's automatic prefix caching. A digest names a block's tokens and all tokens before them, so equal digests mean
equal keys and values. Only full blocks have one. It is a cryptographic hash: nobody can make a prompt that is answered
from the blocks of somebody else's.

A block that is not full, a *tail*, has a digest only where it is the end of a rehearsal (protocol.Submit): whoever goes
on after these tokens has it for himself and writes on in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16

ROOT = bytes(DIGEST_BYTES)
"""What stands for the block before a sequence's first."""


def block_digest(parent: bytes, content: bytes) -> bytes:
    """Digest of a block: of the one before it (ROOT for the first) and of its token ids."""
    return blake2b(parent + content, digest_size=DIGEST_BYTES).digest()


def extend_digests(digests: list[bytes], token_ids: NDArray[np.int32], block_size: int, num_blocks: int) -> None:
    """Append the digests of further full blocks of a sequence, until there are `num_blocks`."""
    assert num_blocks * block_size <= len(token_ids), "only full blocks have a digest"
    content = token_ids[len(digests) * block_size : num_blocks * block_size].tobytes()
    block_bytes = block_size * token_ids.itemsize
    for start in range(0, len(content), block_bytes):
        digests.append(block_digest(digests[-1] if digests else ROOT, content[start : start + block_bytes]))


class PrefixCache:
    """Which block holds which digest. A digest has at most one block, and a block at most one digest."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self.is_cached_B: NDArray[np.bool_] = np.zeros(num_blocks, dtype=np.bool_)
        """By block: whether it has a digest."""
        self._tails: set[int] = set()

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of a sequence that is here."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, digest: bytes, block: int) -> None:
        """Note what a block holds. Where another block holds the same, that one stays the one to be found."""
        if digest in self._block_of:
            return
        assert self._digest_of[block] is None, f"block {block} was written twice"
        self._block_of[digest] = block
        self._digest_of[block] = digest
        self.is_cached_B[block] = True

    def insert_tail(self, parent: bytes, token_ids: NDArray[np.int32], block: int) -> None:
        """Note that a block which is not full begins with these tokens, after those that `parent` is the digest of."""
        digest = block_digest(parent, token_ids.tobytes())
        if digest not in self._block_of:
            self.insert(digest, block)
            self._tails.add(block)

    def find_tail(self, parent: bytes, token_ids: NDArray[np.int32]) -> tuple[int, int] | None:
        """The tail that has the most of these tokens, fewer than a block has, from the first on; and how many."""
        for num_tokens in range(len(token_ids) if self._tails else 0, 0, -1):
            block = self._block_of.get(block_digest(parent, token_ids[:num_tokens].tobytes()))
            if block is not None:
                return block, num_tokens
        return None

    def forget(self, block: int) -> None:
        """The block is about to be written anew."""
        digest = self._digest_of[block]
        assert digest is not None
        del self._block_of[digest]
        self._digest_of[block] = None
        self.is_cached_B[block] = False
        self._tails.discard(block)

    def clear(self) -> None:
        """Forget what every block holds."""
        self._block_of.clear()
        self._tails.clear()
        self._digest_of = [None] * len(self._digest_of)
        self.is_cached_B[:] = False

    def entries(self) -> dict[bytes, int]:
        """A copy of what can be found: each digest with its block."""
        return dict(self._block_of)
