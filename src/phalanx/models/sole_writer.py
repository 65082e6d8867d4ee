"""One writer at a time of what has a name in a file system, whatever process it is in."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from phalanx.errors import CheckpointError


@contextmanager
def sole_writer(target: Path) -> Iterator[None]:
    """While it lasts no other one gets this far, of all that can lock `.NAME.lock` beside `target`; that file is gone
    at the end. One that a killed process has left is in nobody's way.

    Raises CheckpointError if somebody else writes, OSError where no file can be made or locked.
    """
    path = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        stack.callback(os.close, _lock(path, target))
        stack.callback(path.unlink, missing_ok=True)
        yield


def _lock(path: Path, target: Path) -> int:
    """A descriptor that locks the file of this name."""
    while True:
        with ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{target} is just being written by another process") from None
            if _is_of_name(descriptor, path):
                undo.pop_all()
                return descriptor


def _is_of_name(descriptor: int, path: Path) -> bool:
    """Whether it was not removed, by who had it before, between opening and locking it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
