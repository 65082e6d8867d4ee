"""A directory that appears under its name when it is complete, and not before."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.errors import CheckpointError

_OF_A_CHECKPOINT = ("additional_chat_templates",)
"""Directories that a checkpoint may have."""


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError if a checkpoint may not be written to `target`.

    With `overwrite` it may be a directory that holds a checkpoint and nothing that only looks beside it.
    """
    if not target.is_dir():
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{target} is not a directory")
        return
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty; --overwrite replaces the checkpoint in it")
    kept = [entry.name for entry in entries if entry.is_dir() and entry.name not in _OF_A_CHECKPOINT]
    if kept or not (target / "config.json").exists():
        why = f"it holds the directory {kept[0]}" if kept else "it has no config.json"
        raise CheckpointError(f"{target} is not replaced, as it is not only a checkpoint: {why}")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Gives a new directory beside `target`, which takes its place at the end; after an error it is gone.

    What was in `target` until then goes. A process that is killed leaves a directory `.NAME.partial-...`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target, "partial")
    partial.mkdir()
    try:
        yield partial
        _replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _replace(target: Path, new: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.rename(new, target)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)
