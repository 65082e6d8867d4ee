"""What a rank is about to do, in a form that its peers compare in nanoseconds and print when it differs.

No torch here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, get_args

import msgspec

Operation = Literal["all_reduce", "all_gather", "broadcast", "barrier", "reduce_scatter", "all_to_all", "graph"]
"""graph: the replay of all collectives that were captured in a CUDA graph."""

_OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_ARGUMENT_NAMES = {"all_gather": "dim", "broadcast": "src"}
# The order is part of the segment's layout; "" is for operations without a tensor.
_DTYPES = (
    *("", "float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"),
)
_MAX_DIMS = 8
_FIELDS = struct.Struct("<BBBxi")  # operation, dtype, number of dimensions, argument
_DIMS = struct.Struct(f"<{_MAX_DIMS}q")
_DIGEST = struct.Struct("<Q")
DESCRIPTOR_BYTES = _DIGEST.size + _FIELDS.size + _DIMS.size


@dataclass(frozen=True)
class Descriptor:
    """One collective as one rank sees it: all that must be the same on every rank.

    `shape` is that of the rank's tensor; of an all_to_all, whose ranks have as many rows as they have, that of a row;
    of a graph see `of_graph`.
    `argument` is the dimension of an all_gather (from the front) and the source of a broadcast.
    """

    operation: Operation
    dtype: str = ""
    shape: tuple[int, ...] = ()
    argument: int = 0
    digest: int = field(init=False, compare=False, repr=False)
    """64 bits that differ where two descriptors differ."""
    encoded: bytes = field(init=False, compare=False, repr=False)
    """The digest, then the fields: DESCRIPTOR_BYTES in all."""

    def __post_init__(self) -> None:
        assert self.dtype in _DTYPES, f"{self.operation} of {self.dtype}"
        assert len(self.shape) <= _MAX_DIMS, f"{self.operation} of {len(self.shape)} dimensions"

        num_dims = len(self.shape)
        fields = _FIELDS.pack(_OPERATIONS.index(self.operation), _DTYPES.index(self.dtype), num_dims, self.argument)
        body = fields + _DIMS.pack(*self.shape, *(0,) * (_MAX_DIMS - num_dims))
        digest = blake2b(body, digest_size=_DIGEST.size).digest()
        # Plain attributes, made once: every collective of every layer reads them.
        object.__setattr__(self, "digest", *_DIGEST.unpack(digest))
        object.__setattr__(self, "encoded", digest + body)

    @classmethod
    def decode(cls, encoded: bytes | memoryview) -> Descriptor:
        """The inverse of `encoded`."""
        operation, dtype, num_dims, argument = _FIELDS.unpack_from(encoded, _DIGEST.size)
        dims = _DIMS.unpack_from(encoded, _DIGEST.size + _FIELDS.size)
        return cls(_OPERATIONS[operation], _DTYPES[dtype], dims[:num_dims], argument)

    @classmethod
    def of_graph(cls, captured: Sequence[Descriptor]) -> Descriptor:
        """Of these, one or more: `shape` is how many there are, the rows of the first, and 63 bits of all digests."""
        digests = struct.pack(f"<{len(captured)}Q", *(descriptor.digest for descriptor in captured))
        (digest,) = _DIGEST.unpack(blake2b(digests, digest_size=_DIGEST.size).digest())
        rows = captured[0].shape[0] if captured[0].shape else 0
        return cls("graph", shape=(len(captured), rows, digest >> 1))

    def __str__(self) -> str:
        if self.operation == "graph":
            num_collectives, rows, digest = self.shape
            return f"a graph of {num_collectives} collectives of {rows} rows ({digest:016x})"
        argument = _ARGUMENT_NAMES.get(self.operation)
        tensor = f" {self.dtype} {list(self.shape)}" if self.dtype else ""
        return self.operation + tensor + (f" {argument}={self.argument}" if argument else "")


@lru_cache(maxsize=4096)  # shapes vary with the number of tokens in a step; this is more than there are in a while
def described(operation: Operation, dtype: object, shape: tuple[int, ...], argument: int = 0) -> Descriptor:
    """A collective of a tensor of this torch dtype and shape; made once, as layers wait for it in every step."""
    return Descriptor(operation, dtype_name(dtype), tuple(shape), argument)


def dtype_name(dtype: object) -> str:
    """The name that a torch dtype has here: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


class CollectiveRecord(msgspec.Struct, frozen=True):
    """One collective that a rank issued: its descriptor's fields. `sequence` counts the group's collectives from 1."""

    group: str
    epoch: int
    sequence: int
    operation: Operation
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        tensor = f" {self.dtype} {list(self.shape)}" if self.dtype else ""
        return f"{self.operation}{tensor} (sequence {self.sequence} of group {self.group}, epoch {self.epoch})"
