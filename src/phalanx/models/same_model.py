"""Whether the weights of one checkpoint can take the place of another's in a model that runs. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint import Checkpoint

_WITHOUT_MEANING = frozenset({"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"})
"""Settings that say where a checkpoint was and what wrote it, and nothing of what is computed. The tensors themselves
tell their types.
"""

_MOST_TOLD = 4

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]


def check_same_model(before: Checkpoint, after: Checkpoint) -> None:
    """Raises CheckpointError that names what differs: a setting of config.json, or a tensor's name, type or shape."""
    found = [*_settings_apart(before.settings, after.settings), *_tensors_apart(before.kinds, after.kinds)]
    if found:
        more = f"; and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
        told = "; ".join(found[:_MOST_TOLD])
        raise CheckpointError(f"{after.name} is another model than the one that runs ({before.name}): {told}{more}")


def _settings_apart(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted((before.keys() | after.keys()) - _WITHOUT_MEANING):
        if before.get(name) != after.get(name):
            yield f"config.json has {name} {after.get(name)!r}, not {before.get(name)!r}"


def _tensors_apart(before: Kinds, after: Kinds) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield f"it lacks the tensor {name}"
        elif name not in before:
            yield f"it has a tensor {name}, which is new"
        elif before[name] != after[name]:
            yield f"{name} is {_told(*after[name])}, not {_told(*before[name])}"


def _told(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
