"""A rank's part of a checkpoint: which tensors it takes, how they are read, and how others come into their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.errors import CheckpointError
from phalanx.memory.arena import Allocate
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.four_bit_experts import Form, Part
from phalanx.models.packed import Packing, Release
from phalanx.models.shards import Shard, Sharding
from phalanx.models.weights import Source, WeightReader
from phalanx.moe.four_bits import FourBitWeight
from phalanx.moe.shared_experts import SharedExperts

OnProgress = Callable[[int, int], None]


class RankPart(NamedTuple):
    """What a rank takes of its model's checkpoint, or of another one with the same tensors."""

    shards: Mapping[str, Shard]
    sources: Mapping[str, Sequence[Source]]
    dtypes: Mapping[str, torch.dtype]
    in_four_bits: Mapping[str, Form]
    tied: Sequence[str]
    """Two tensors of the checkpoint that are read as one, since they were equal."""

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The tensors of each parameter: one, or those of a weight in 4 bits."""
        return {
            name: self.in_four_bits[name].parts(name)
            if name in self.in_four_bits
            else (Part(name, shard.shape, self.dtypes[name]),)
            for name, shard in self.shards.items()
        }

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for some in self.parts.values() for part in some)

    def read(
        self, reader: WeightReader, allocate: Allocate, on_progress: OnProgress, filled: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """This rank's tensors by name, in memory from `allocate`; those in `filled` are there already, and not read.

        Raises CheckpointError.
        """
        parts, total_bytes, done_bytes = self.parts, self.num_bytes, 0
        weights: dict[str, Tensor] = {}
        for name, shard in self.shards.items():
            targets = [allocate(*part) for part in parts[name]]
            if all(part.name in filled for part in parts[name]):
                pass
            elif name in self.in_four_bits:
                reader.fill_four_bits(FourBitWeight(*targets), shard, self.sources[name])
            else:
                reader.fill(targets[0], shard, self.sources[name])
            weights |= {part.name: target for part, target in zip(parts[name], targets, strict=True)}
            done_bytes += sum(target.nbytes for target in targets)
            on_progress(done_bytes, total_bytes)
        return weights


class RankWeights:
    """The weights that a rank's model computes with. For the use of one thread, but for `read`."""

    def __init__(
        self,
        part: RankPart,
        tensors: Mapping[str, Tensor],
        packing: Packing | None,
        experts: Iterable[SharedExperts] = (),
    ) -> None:
        """`tensors` are the model's own; `experts` those of them that may have moved since they were read."""
        self._part = part
        self._tensors = tensors
        self._packing = packing
        self._experts = tuple(experts)

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors that are read."""
        return tuple(self._tensors)

    @property
    def places(self) -> Sequence[str]:
        """Of all memory that `take` fills anew, and that `let_go` gives back: of packed weights, too."""
        return (*self._tensors, *(self._packing.names if self._packing is not None else ()))

    @cached_property
    def num_bytes(self) -> int:
        """What they take, when they are there."""
        return self.plain_bytes + (self._packing.duplicate_bytes if self._packing is not None else 0)

    @cached_property
    def plain_bytes(self) -> int:
        """What `read` takes for others."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, checkpoint: Checkpoint, on_progress: OnProgress, *, in_place: bool) -> dict[str, Tensor]:
        """The same tensors of a checkpoint that has them in the same types and shapes: for `take`.

        They are read into memory of this process, beside those in use; with `in_place`, where those lie that nobody
        uses since `let_go`. Issues no collective, so that a thread of its own may do it while the model computes.

        Raises CheckpointError, and what `on_progress` raises.
        """
        tied = self._part.tied
        with WeightReader(checkpoint.tensors) as reader:
            if tied and not reader.are_equal(*tied):
                raise CheckpointError(
                    f"{checkpoint.name}: {' and '.join(tied)} differ, and are one tensor in the model"
                )
            return self._part.read(reader, self._own if in_place else _of_host, on_progress, {})

    def take(self, fresh: dict[str, Tensor]) -> None:
        """Compute with these from now on. They are taken out of `fresh`, and let go one by one.

        Their addresses are those of the ones before, as a CUDA graph wants them. Who dies on the way leaves some of
        these and some of those behind.
        """
        if self._packing is not None:
            self._packing.forget()
        for name in list(fresh):
            tensor = fresh.pop(name)
            if tensor is not self._tensors[name]:
                self._tensors[name].copy_(tensor)
        for experts in self._experts:
            experts.begin()
        if self._packing is not None:
            self._packing.pack()

    def find(self) -> None:
        """Compute with what has come to `places` meanwhile: as others, who have the same, read and packed it."""
        if self._packing is not None:
            self._packing.find()

    def let_go(self, release: Release) -> None:
        """Give their memory back, through what knows it by the tensors' names. They have to be read again."""
        if self._packing is not None:
            self._packing.forget()
        release(self.places)

    def _own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._tensors[name]


def tie(
    sharding: Sharding,
    shards: dict[str, Shard],
    sources: dict[str, list[Source]],
    reader: WeightReader,
    filled: Mapping[str, int],
) -> Sequence[str]:
    """Have head and embedding read the same tensor, once where one rank has both.

    As in transformers, a checkpoint that has two different ones is believed. Gives their names in the checkpoint if it
    has two that are equal.
    """
    embedding, head = sources.get(sharding.embedding_name), sources.get(sharding.head_name)
    if sharding.embedding_name in shards and sharding.embedding_name in filled:
        are_equal = sharding.head_name not in filled  # as whoever filled them has found
    else:
        are_equal = not (embedding and head) or reader.are_equal(embedding[0].key, head[0].key)
    if not are_equal:
        return ()
    if found := embedding or head:
        sources[sharding.embedding_name] = sources[sharding.head_name] = found
    if sharding.embedding_name in shards:
        shards.pop(sharding.head_name, None)
    return (embedding[0].key, head[0].key) if embedding and head else ()


def _of_host(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)
