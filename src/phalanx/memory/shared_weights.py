"""Weights of one engine's ranks that those of another one on the same host compute with, too. Knows no torch.

It is the same memory: nothing is read, copied or packed again, and any number of ranks take what one takes. Nobody
writes to it from then on. Who wants other weights, or none, takes memory of its own first.
"""

from __future__ import annotations

import msgspec

from phalanx.memory.held import HeldMemory
from phalanx.transport.shared_memory import resident_bytes_of


class WeightsKind(msgspec.Struct, frozen=True):
    """All that a rank's memory depends on, beside its number: only who has the same can compute with it."""

    fingerprint: bytes
    """Of the checkpoint."""
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    pack_weights: bool
    versions: tuple[str, ...]
    """Of the programs that lay weights out: they may be others by the time that an engine joins."""


class SharedWeights(msgspec.Struct, frozen=True):
    """Of all ranks of an engine."""

    kind: WeightsKind
    ranks: tuple[HeldMemory, ...]
    """By rank. It is there as long as the engine lives and has not let go of it."""


def encode_shared(weights: SharedWeights) -> bytes:
    """As msgpack, for a message."""
    return msgspec.msgpack.encode(weights)


def decode_shared(message: bytes) -> SharedWeights:
    """What `encode_shared` has made."""
    return msgspec.msgpack.decode(message, type=SharedWeights)


def resident_bytes(message: bytes) -> int:
    """Memory that those of a message take once for all; 0 of an empty one, and of what is gone."""
    if not message:
        return 0
    return sum(resident_bytes_of(handle) for rank in decode_shared(message).ranks for handle in rank.segments)
