"""A limit on one process's memory, at which the kernel kills it: by a control group, as its owner may make them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

LIMIT_BYTES = 16 << 20
"""Of what it takes from then on: what it has already counts for the group that it was in."""
_PIECE_BYTES = 1 << 20
_MOST_PIECES = 1024

_NAME = "phalanx-limit-"
_MOUNT = Path("/sys/fs/cgroup")
_HIERARCHIES = (
    (_MOUNT / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", str(LIMIT_BYTES)),
    (_MOUNT, "memory.max", "memory.swap.max", "0"),
)
"""Of control groups of the first and of the second version: where; the limits on memory and on what may be swapped."""


def is_possible() -> bool:
    """Whether this process may make such a group."""
    with _group("try") as group:
        return group is not None


def run_out() -> NoReturn:
    """Take memory until the kernel ends this process for it. Raises OSError if it cannot be made to."""
    group = _make(str(os.getpid()))
    if group is None:
        raise PermissionError(f"no control groups with a limit on memory can be made in {_MOUNT}")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    taken = [b"\1" * _PIECE_BYTES for _ in range(_MOST_PIECES)]
    raise OSError(f"{len(taken)} MiB were taken with a limit of {LIMIT_BYTES >> 20}")


def remove_groups() -> None:
    """Those of processes that have ended."""
    for where, *_ in _HIERARCHIES:
        for group in where.glob(_NAME + "[0-9]*"):
            if not Path("/proc", group.name.removeprefix(_NAME)).exists():
                with suppress(OSError):  # another one has
                    group.rmdir()


@contextmanager
def _group(name: str) -> Iterator[Path | None]:
    made = _make(f"{name}-{os.getpid()}")
    try:
        yield made
    finally:
        if made is not None:
            made.rmdir()


def _make(name: str) -> Path | None:
    """With the limit; None if it cannot be made."""
    for where, limit, swap_limit, swap in _HIERARCHIES:
        group = where / (_NAME + name)
        with suppress(OSError):
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(LIMIT_BYTES))
                with suppress(OSError):  # where swap is not counted
                    (group / swap_limit).write_text(swap)
                return group
            group.rmdir()
    return None
