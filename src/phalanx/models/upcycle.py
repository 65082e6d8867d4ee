"""A dense checkpoint made into a mixture of experts, each of which begins as a copy of the MLP.

Source: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", 2022. The weights of
the chosen experts add up to 1, so that identical experts compute what the MLP did.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.checkpoint_files import BESIDE_THE_MODEL
from phalanx.models.definition import definition_class
from phalanx.models.mixture import Mixture
from phalanx.models.mixture_architecture import MLP_WEIGHT, Architecture, on_meta, pick
from phalanx.models.progress import Progress
from phalanx.models.sharded_files import MAX_FILE_BYTES, PlannedTensor, write_files
from phalanx.models.shards import Shard
from phalanx.models.weight_files import DTYPES
from phalanx.models.weights import Source, WeightReader, find_sources
from phalanx.models.whole_directory import prepare_target, whole_directory


def upcycle(
    checkpoint: Checkpoint,
    target: Path,
    mixture: Mixture,
    *,
    overwrite: bool = False,
    progress: Progress,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Checkpoint:
    """Write a mixture of experts made from a dense `checkpoint` into the directory `target`, whole or not at all.

    Blocks until it is written. One matrix is in memory at a time.

    Raises CheckpointError if `target` holds something (and `overwrite` is not given, or it is not only a checkpoint),
    is just being written by another process, cannot be written or has too little room, or if the checkpoint lacks
    tensors; UnsupportedModelError naming what of the model the architecture cannot express.
    """
    target = Path(os.path.expanduser(target)).resolve()
    prepare_target(target, overwrite=overwrite)
    if overwrite and any(path.is_relative_to(target) for path in _places(checkpoint)):
        raise CheckpointError(f"{target} cannot be replaced: the model that is read is in it")
    architecture, config = pick(checkpoint, mixture)
    with WeightReader(checkpoint.tensors) as reader:
        tensors = _Plan(checkpoint, mixture, architecture, reader).tensors()
        _check_room(target, sum(tensor.num_bytes for tensor in tensors))
        try:
            with whole_directory(target, overwrite=overwrite) as directory:
                write_files(directory, tensors, progress, max_file_bytes)
                _carry(checkpoint.path, directory)
                config.save_pretrained(directory)  # last: without it, it is no checkpoint
                Checkpoint(directory, str(target)).check()
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return Checkpoint(target, str(target))


class _Plan:
    """From the dense model's parameters to the mixture's tensors."""

    def __init__(
        self, checkpoint: Checkpoint, mixture: Mixture, architecture: Architecture, reader: WeightReader
    ) -> None:
        self._checkpoint = checkpoint
        self._mixture = mixture
        self._architecture = architecture
        self._reader = reader
        model = on_meta(checkpoint.hf_config, definition_class(checkpoint))
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._sources = find_sources(model, checkpoint.tensors, self._shapes)
        self._check_complete(model)

    def tensors(self) -> list[PlannedTensor]:
        planned: list[PlannedTensor] = []
        for name in self._sources:
            mlp = MLP_WEIGHT.fullmatch(name)
            if mlp is None:
                planned.append(self._planned(name, name))
            elif mlp["matrix"] == "gate":
                planned.extend(self._experts(mlp["layer"]))
        return planned

    def _experts(self, layer: str) -> Iterator[PlannedTensor]:
        """A layer's router and its experts' matrices."""
        yield self._router(layer)
        names = {"gate": self._architecture.gate, "up": self._architecture.up, "down": self._architecture.down}
        for expert in range(self._mixture.num_experts):
            for matrix, name in names.items():
                yield self._planned(layer + name.format(expert), f"{layer}mlp.{matrix}_proj.weight", is_expert=True)

    def _planned(self, name: str, parameter: str, *, is_expert: bool = False) -> PlannedTensor:
        make = partial(self._with_noise, name, parameter) if is_expert else partial(self._read, parameter)
        return PlannedTensor(name, self._shapes[parameter], self._dtype(parameter), make)

    def _router(self, layer: str) -> PlannedTensor:
        name = layer + self._architecture.router
        dtype = self._dtype(f"{layer}mlp.gate_proj.weight")
        norm = f"{layer}post_attention_layernorm.weight"
        shape = (self._mixture.num_experts, *self._shapes[norm])
        return PlannedTensor(name, shape, dtype, partial(self._random_router, name, norm, shape, dtype))

    def _random_router(self, name: str, norm: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Normal weights, of a scale that gives logits a variance of about 1 for what the norm puts out.

        With equal rows, all experts would score the same and every token would go to the first of them.
        """
        gain = self._read(norm).float().square().mean().sqrt().item() or 1.0
        weights = torch.randn(shape, generator=self._generator(name)) / (math.sqrt(shape[1]) * gain)
        return weights.to(dtype)

    def _with_noise(self, name: str, parameter: str) -> Tensor:
        weights = self._read(parameter)
        if self._mixture.noise == 0.0:
            return weights
        exact = weights.float()
        deviation = self._mixture.noise * exact.square().mean().sqrt()
        noise = torch.randn(exact.shape, generator=self._generator(name))
        return exact.add_(noise.mul_(deviation)).to(weights.dtype)

    def _generator(self, name: str) -> torch.Generator:
        """Of one tensor: its numbers do not depend on what else is made."""
        digest = hashlib.blake2b(f"{self._mixture.seed} {name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def _read(self, parameter: str) -> Tensor:
        tensor = torch.empty(self._shapes[parameter], dtype=self._dtype(parameter))
        self._reader.fill(tensor, Shard.whole(self._shapes[parameter]), self._sources[parameter])
        return tensor

    def _dtype(self, parameter: str) -> torch.dtype:
        """As it is stored."""
        sources: Sequence[Source] = self._sources[parameter]
        dtype: torch.dtype = getattr(torch, DTYPES[self._checkpoint.tensors[sources[0].key].dtype])
        return dtype

    def _check_complete(self, model: Any) -> None:
        """The head may be left out if it is tied to the embedding, or the other way round."""
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        ends = {names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]}
        may_lack = ends if model.config.tie_word_embeddings and ends & self._sources.keys() else set()
        if missing := [name for name in self._shapes if name not in self._sources and name not in may_lack]:
            some = ", ".join(missing[:4])
            raise CheckpointError(f"{self._checkpoint.path} lacks {len(missing)} of the model's tensors: {some}")


def _places(checkpoint: Checkpoint) -> list[Path]:
    """Where what is read lies: a GGUF file is not where its converted form is."""
    return [checkpoint.path, Path(os.path.expanduser(checkpoint.name)).resolve()]


def _check_room(target: Path, num_bytes: int) -> None:
    there = next(parent for parent in target.parents if parent.exists())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < num_bytes:
        raise CheckpointError(
            f"{target} needs {decimal(num_bytes)}, and there are {decimal(free_bytes)} left on its disk"
        )


def _carry(source: Path, directory: Path) -> None:
    for pattern in BESIDE_THE_MODEL:
        for file in source.glob(pattern):
            if file.is_file():
                copied = directory / file.relative_to(source)
                os.makedirs(copied.parent, exist_ok=True)
                shutil.copyfile(file, copied)
