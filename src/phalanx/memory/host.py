"""Memory of this host: what is free, what a process and its children take, and how it is given back. Without torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMORY_NODES = Path("/sys/devices/system/node/has_memory")


class _Account(NamedTuple):
    """Where control groups of one version keep their accounts of memory."""

    root: Path
    limit: str
    used: str
    reclaimable: tuple[str, ...]
    """Fields of memory.stat: file pages, which count as used and give way to whoever needs the memory."""


def free_host_bytes() -> int:
    """Memory that this process may still take: the system's, or less where its control groups set a limit."""
    free_on_system = _fields(PROC / "meminfo")["MemAvailable:"] * 1024
    return max(min([free_on_system, *_free_in_control_groups()]), 0)


def bytes_of_family(pid: int) -> int:
    """What a process and those below it take, less what others would read from files again.

    Memory that several of them share counts once. 0 if it is gone. Takes milliseconds for each gigabyte.
    """
    return sum(_bytes_of(member) for member in _family(pid))


def num_memory_nodes() -> int:
    """NUMA nodes that have memory: more than one where several processors have each their own."""
    try:
        ranges = MEMORY_NODES.read_text().strip()
    except FileNotFoundError:  # a kernel without NUMA
        return 1
    bounds = [[int(bound) for bound in one.split("-")] for one in ranges.split(",")]
    return sum(bound[-1] - bound[0] + 1 for bound in bounds)


def trim_heap() -> None:
    """Give the system what this process has freed and its allocator keeps, where the C library can do so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = [child for task in (PROC / str(pid) / "task").iterdir() for child in _words(task / "children")]
    except OSError:  # it has ended
        return
    for child in children:
        yield from _family(int(child))


def _words(file: Path) -> list[str]:
    return file.read_text().split()


def _bytes_of(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended, or is another user's
        return 0
    wanted = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))


def _free_in_control_groups() -> Iterator[int]:
    """What is left in each control group with a limit that this process is in: a group's limit binds those below it."""
    memberships = PROC / "self/cgroup"
    if not memberships.exists():  # a kernel without control groups
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            account = _Account(CONTROL_GROUPS, "memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            account = _Account(CONTROL_GROUPS / "memory", *files, ("total_inactive_file", "total_active_file"))
        else:
            continue
        group = account.root / path.removeprefix("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(account.root):
                yield from _free_in_group(directory, account)


def _free_in_group(directory: Path, account: _Account) -> Iterator[int]:
    """One number, or none where there is no limit."""
    try:
        limit, used = ((directory / name).read_text().strip() for name in (account.limit, account.used))
        stat = _fields(directory / "memory.stat")
    except OSError:  # in a container, groups above its own cannot be seen, nor can what its own is called outside
        return
    if limit.isdigit():
        yield int(limit) - int(used) + sum(stat.get(name, 0) for name in account.reclaimable)


def _fields(file: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    return {words[0]: int(words[1]) for words in map(str.split, file.read_text().splitlines())}
