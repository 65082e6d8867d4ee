"""A directory that appears under its name when it is complete, and not before."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.errors import CheckpointError
from phalanx.models.checkpoint_files import BESIDE_THE_MODEL, MODEL
from phalanx.models.sole_writer import sole_writer

_CONFIG = "config.json"
_NUM_SHOWN = 3


def prepare_target(target: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError if a checkpoint may not be written to `target`, or somebody else just writes one.

    With `overwrite` it may be a directory that holds a checkpoint and nothing else. What a killed run has left of an
    earlier checkpoint is put back, if there is no other one, or removed.
    """
    if not target.parent.is_dir():
        return
    try:
        with sole_writer(target):
            _prepare(target, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error


@contextmanager
def whole_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a new directory beside `target`, which takes its place at the end; after an error it is gone.

    What was in `target` until then goes, as far as `prepare_target` allows. A process that is killed leaves a directory
    `.NAME.partial-...` behind; killed between the two renames it leaves the old one as `.NAME.old-...`, which
    `prepare_target` puts back. Raises as that does, at the beginning and at the end: others may have written meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(target):
        _prepare(target, overwrite=overwrite)
        partial = _beside(target, "partial")
        partial.mkdir()
        try:
            yield partial
            _check(target, overwrite=overwrite)
            _replace(target, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _prepare(target: Path, *, overwrite: bool) -> None:
    try:
        _clear_up(target)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be cleared away: {error.strerror}") from error
    _check(target, overwrite=overwrite)


def _check(target: Path, *, overwrite: bool) -> None:
    if not target.is_dir():
        if target.exists() or target.is_symlink():
            raise CheckpointError(f"{target} is not a directory")
        return
    if _is_empty(target):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty; --overwrite replaces the checkpoint in it")
    reasons = [] if _is_checkpoint(target) else ["it has no config.json"]
    if unrelated := _unrelated(target):
        more = f" and {len(unrelated) - _NUM_SHOWN} more" if len(unrelated) > _NUM_SHOWN else ""
        reasons.append(f"it holds {', '.join(unrelated[:_NUM_SHOWN])}{more}")
    if reasons:
        raise CheckpointError(f"{target} is not replaced, as it is not only a checkpoint: {', and '.join(reasons)}")


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _replace(target: Path, new: Path) -> None:
    if not target.exists() or _is_empty(target):
        os.rename(new, target)
        return
    old = _beside(target, "old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    _remove(old)


def _remove(old: Path) -> None:
    (old / _CONFIG).unlink(missing_ok=True)  # first: what is left of a checkpoint must not look like one
    shutil.rmtree(old)


def _clear_up(target: Path) -> None:
    """After a run that was killed while it put a new checkpoint in the place of an old one."""
    name = re.compile(rf"\.{re.escape(target.name)}\.old-[0-9a-f]{{8}}")
    for old in [path for path in target.parent.glob(".*.old-*") if name.fullmatch(path.name)]:
        if _is_checkpoint(old) and (not target.exists() or _is_empty(target)):
            os.rename(old, target)
        elif _is_checkpoint(target) or not _is_checkpoint(old):
            _remove(old)


def _is_checkpoint(directory: Path) -> bool:
    return (directory / _CONFIG).exists()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _unrelated(directory: Path) -> list[str]:
    """What no checkpoint has, by name. Directories end in a slash."""
    files = {path for pattern in (*MODEL, *BESIDE_THE_MODEL) for path in directory.glob(pattern) if path.is_file()}
    folders = {path.parent for path in files} - {directory}
    found = {entry for folder in (directory, *folders) for entry in folder.iterdir()}
    return sorted(f"{path.relative_to(directory)}{'/' if path.is_dir() else ''}" for path in found - files - folders)
