"""A limit on one process's memory, at which the kernel kills it: by a control group, as its owner may make them."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
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


@cache
def is_possible() -> bool:
    """Whether this process may make such a group."""
    group = _make(f"of-{os.getpid()}")
    if group is None:
        return False
    _remove(group)
    return True


def enter() -> None:
    """Have this process limited. Raises OSError."""
    for is_last in (False, True):
        group = _make(str(os.getpid()))
        if group is None:
            raise PermissionError(f"no control groups with a limit on memory can be made in {_MOUNT}")
        try:
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return
        except FileNotFoundError:  # nobody was in it, and another process has removed it
            if is_last:
                raise


def run_out() -> NoReturn:
    """Take memory until the kernel ends this process for it. Raises OSError if it does not, as without a limit."""
    taken = [b"\1" * _PIECE_BYTES for _ in range(_MOST_PIECES)]
    raise OSError(f"{len(taken)} MiB were taken, and this process lives")


def remove_groups() -> None:
    """Those that nobody is in: the kernel keeps the others."""
    for where, *_ in _HIERARCHIES:
        for group in where.glob(_NAME + "[0-9]*"):
            _remove(group)


def _make(name: str) -> Path | None:
    """With the limit; None if it cannot be made."""
    for where, limit, swap_limit, swap in _HIERARCHIES:
        group = where / (_NAME + name)
        try:
            group.mkdir(exist_ok=True)
        except OSError:
            continue
        if _has_set(group / limit, str(LIMIT_BYTES)):
            _has_set(group / swap_limit, swap)  # it may be that swap is not counted
            return group
        _remove(group)
    return None


def _has_set(setting: Path, value: str) -> bool:
    with suppress(OSError):
        if setting.exists():
            setting.write_text(value)
            return True
    return False


def _remove(group: Path) -> None:
    with suppress(OSError):
        group.rmdir()
