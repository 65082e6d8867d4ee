"""From the tensors of a checkpoint to a rank's parameters: each rank reads its own part, out of mapped files.

A checkpoint's names and layout may be older than the model's: transformers' conversion mapping tells how they relate.
Of its operations those are known here that put single experts' matrices into fused ones.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.dequantise import Slices, read_numbers, read_quantised
from phalanx.models.quantisation import QuantisedInfo, StoredTensor
from phalanx.models.shards import Shard
from phalanx.moe.four_bits import FourBitWeight, pack
from phalanx.topology.sharding import Span

_STACK_AND_CONCATENATE = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""Operations of a fused experts' parameter: matrices of all experts stacked, then (gate and up) one above the other."""

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A tensor of the checkpoint and its place in a parameter."""

    key: str
    expert: int | None = None
    """Index in the parameter's first dimension, which the tensor lacks; None if it has all dimensions."""
    row: int = 0
    """Where the tensor begins along its own first dimension."""


def import_conversions() -> None:
    """Have transformers make its table of the conversions of all models, which takes it a tenth of a second."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("")


def find_sources(model: Any, tensors: Mapping[str, StoredTensor], parameters: Iterable[str]) -> dict[str, list[Source]]:
    """The checkpoint's tensors that each parameter is made of.

    What the checkpoint has and the model has no use for is logged. A parameter without sources is absent from the
    result. Raises UnsupportedModelError for a conversion that is not known here.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    wanted = set(parameters)
    sources: dict[str, list[Source]] = {}
    unused = []
    for key in tensors:
        name, source = _place(key, tensors[key], transforms)
        if name in wanted:
            sources.setdefault(name, []).append(source)
        else:
            unused.append(key)
    if unused:
        _log.warning("the model has no use for %d tensors of its checkpoint: %s", len(unused), ", ".join(unused[:4]))
    return sources


def _place(key: str, info: StoredTensor, transforms: Sequence[Any]) -> tuple[str, Source]:
    """The parameter that a tensor belongs to, and where in it."""
    if isinstance(info, QuantisedInfo) and info.parameter is not None:
        return info.parameter, Source(key, info.expert)
    name, source = key, Source(key)
    for transform in transforms:
        name, pattern = transform.rename_source_key(name)
        operations = [type(operation).__name__ for operation in getattr(transform, "operations", ())]
        if pattern is None or not operations:
            continue
        if operations not in _STACK_AND_CONCATENATE:
            raise UnsupportedModelError(f"{key} is converted by {' and '.join(operations)}, which is not known here")
        expert = int(re.findall(r"\.(\d+)\.", key)[-1])
        source = Source(key, expert, transform.source_patterns.index(pattern) * info.shape[0])
    return name, source


class _ExpertPart(NamedTuple):
    """What a shard takes of one expert's matrix."""

    slot: int
    """The expert's place in the shard."""
    row: int
    """Where its rows begin there."""
    rows: Span
    columns: Span
    """Of the matrix."""


class WeightReader:
    """Reads parts of tensors, and dequantises them. A context manager: the files stay mapped until it ends."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def fill(self, target: Tensor, shard: Shard, sources: Sequence[Source]) -> None:
        """Write a rank's part of a parameter into `target`, converting the dtype.

        Raises CheckpointError if the tensors' shapes do not make up the parameter's, or a file cannot be read.
        """
        self._check(shard, sources)
        if shard.is_padded:
            target.zero_()
        for source in sources:
            if source.expert is None:
                self._copy(target, shard, source, shard.dim)
            elif shard.dim == 0:  # whole experts
                for i, (first, last) in enumerate(shard.spans):
                    if first <= source.expert < last:
                        self._copy_whole(target[i * shard.span_size + source.expert - first], source)
            else:
                self._copy(target[source.expert], shard, source, shard.dim - 1)

    def fill_four_bits(self, target: FourBitWeight, shard: Shard, sources: Sequence[Source]) -> None:
        """As `fill`, without dequantising: every expert's matrices are quantised, with groups that `target`'s divide.

        Padding stands for zeros.
        """
        self._check(shard, sources)
        if shard.is_padded:
            for tensor in target:
                if tensor is not None:
                    tensor.zero_()
        for source in sources:
            for part in self._expert_parts(shard, source):
                self._repack(target, part, source.key)

    def are_equal(self, key: str, other_key: str) -> bool:
        """Whether two tensors of the checkpoint hold the same values."""
        return torch.equal(self._part(key), self._part(other_key))

    def _copy(self, target: Tensor, shard: Shard, source: Source, dim: int) -> None:
        """Copy what the shard takes of one tensor. `dim` is the shared-out dimension of the tensor and of `target`."""
        info = self._tensors[source.key]
        if dim > 0:
            target = target.narrow(0, source.row, info.shape[0])
        begin = source.row if dim == 0 else 0
        has = Span(begin, begin + info.shape[dim])
        for i, span in enumerate(shard.spans):
            taken = span.intersection(has)
            if taken.size:
                part = self._part(source.key, dim, taken.shifted(-begin))
                target.narrow(dim, i * shard.span_size + taken.start - span.start, taken.size).copy_(part)

    def _copy_whole(self, target: Tensor, source: Source) -> None:
        info = self._tensors[source.key]
        target.narrow(0, source.row, info.shape[0]).copy_(self._part(source.key))

    def _expert_parts(self, shard: Shard, source: Source) -> Iterator[_ExpertPart]:
        outputs, inputs = (Span(0, size) for size in self._tensors[source.key].shape)
        assert source.expert is not None
        if shard.dim == 0:  # whole experts
            for i, (first, last) in enumerate(shard.spans):
                if first <= source.expert < last:
                    yield _ExpertPart(i * shard.span_size + source.expert - first, source.row, outputs, inputs)
        elif shard.dim == 1:
            for i, span in enumerate(shard.spans):
                taken = span.intersection(outputs.shifted(source.row))
                row = i * shard.span_size + taken.start - span.start
                if taken.size:
                    yield _ExpertPart(source.expert, row, taken.shifted(-source.row), inputs)
        else:
            (columns,) = shard.spans
            yield _ExpertPart(source.expert, source.row, outputs, columns)

    def _repack(self, target: FourBitWeight, part: _ExpertPart, key: str) -> None:
        info = self._tensors[key]
        assert isinstance(info, QuantisedInfo)
        found = read_numbers(info, self._slices(info), part.rows, part.columns)
        begins_G = torch.arange(*part.columns, target.group_size)
        group_G = begins_G // info.group_size - part.columns.start // info.group_size
        rows = slice(part.row, part.row + part.rows.size)
        target.numbers_EOB[part.slot, rows].copy_(pack(found.number_OI))
        target.scales_EGO[part.slot, :, rows].copy_(found.scale_OG[:, group_G].T)
        if target.zeros_EGO is not None:
            assert found.zero_OG is not None
            target.zeros_EGO[part.slot, :, rows].copy_(found.zero_OG[:, group_G].T)

    def _part(self, key: str, dim: int = 0, span: Span | None = None) -> Tensor:
        """Some indices of one dimension of a tensor, by default all, and all of the others."""
        info = self._tensors[key]
        if not isinstance(info, QuantisedInfo):
            index = slice(None) if span is None else slice(*span)
            part: Tensor = self._file(info.file).get_slice(key)[(*[slice(None)] * dim, index)]
            return part
        spans = [Span(0, size) for size in info.shape]
        spans[dim] = spans[dim] if span is None else span
        return read_quantised(info, self._slices(info), *spans)

    def _slices(self, info: QuantisedInfo) -> Slices:
        return lambda suffix: self._file(info.parts[suffix].file).get_slice(info.stem + suffix)

    def _check(self, shard: Shard, sources: Sequence[Source]) -> None:
        shapes = [self._tensors[source.key].shape for source in sources]
        inner = shard.full_shape[1:] if sources[0].expert is None else shard.full_shape[2:]
        if any(shape[1:] != inner for shape in shapes) or sum(map(math.prod, shapes)) != math.prod(shard.full_shape):
            found = " + ".join(str(list(shape)) for shape in shapes[:4]) + (" + ..." if len(shapes) > 4 else "")
            raise CheckpointError(
                f"{self._tensors[sources[0].key].file}: {sources[0].key} has shape {found}, "
                f"and the model's configuration wants {list(shard.full_shape)}"
            )

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._files[path]
