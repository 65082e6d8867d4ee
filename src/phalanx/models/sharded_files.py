"""Writes a checkpoint's safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.models.progress import Progress
from phalanx.models.weight_files import INDEX, SINGLE, write_header

MAX_FILE_BYTES = 2_000_000_000


class PlannedTensor(NamedTuple):
    """A tensor that is made when it is its turn to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_files(
    directory: Path, tensors: Sequence[PlannedTensor], progress: Progress, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write `tensors` into files of at most `max_file_bytes`, or one tensor, each; several have an index.

    Blocks until they are written, and tells `progress` how many bytes are. Raises OSError.
    """
    files = list(_files(tensors, max_file_bytes))
    names = [SINGLE] if len(files) == 1 else [_name(i, len(files)) for i in range(len(files))]
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    done_bytes = 0
    for name, held in zip(names, files, strict=True):
        with (directory / name).open("xb") as sink:
            write_header(
                sink, {tensor.name: tensor.shape for tensor in held}, str(held[0].dtype).removeprefix("torch.")
            )
            for tensor in held:
                progress("writing", done_bytes, total_bytes)
                sink.write(_bytes(tensor))
                done_bytes += tensor.num_bytes
    progress("writing", total_bytes, total_bytes)
    if len(files) > 1:
        weight_map = {tensor.name: name for name, held in zip(names, files, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2))


def _files(tensors: Sequence[PlannedTensor], max_file_bytes: int) -> Iterator[list[PlannedTensor]]:
    """The tensors of each file: in their order, but for those of another dtype, which have files of their own."""
    held: list[PlannedTensor] = []
    held_bytes = 0
    for tensor in sorted(tensors, key=lambda tensor: str(tensor.dtype)):
        if held and (tensor.dtype != held[0].dtype or held_bytes + tensor.num_bytes > max_file_bytes):
            yield held
            held, held_bytes = [], 0
        held.append(tensor)
        held_bytes += tensor.num_bytes
    yield held


def _name(i: int, num_files: int) -> str:
    return f"model-{i + 1:05}-of-{num_files:05}.safetensors"


def _bytes(planned: PlannedTensor) -> memoryview:
    tensor = planned.make()
    assert (tuple(tensor.shape), tensor.dtype) == (planned.shape, planned.dtype), planned.name
    return tensor.contiguous().view(torch.uint8).numpy().data
