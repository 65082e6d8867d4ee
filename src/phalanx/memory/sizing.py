"""How much memory a rank may take, and how many KV cache blocks that makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from phalanx.config import CacheConfig
from phalanx.errors import ConfigError

CPU_CACHE_SHARE = 0.25
"""Share of the host's free memory that all ranks' KV caches take by default. It is touched only as it fills."""

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


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


def cache_bytes(
    cache: CacheConfig, device: torch.device, *, useful_bytes: int, peak_activation_bytes: int, ranks_on_host: int
) -> int:
    """Bytes that one rank may use for its KV cache.

    `useful_bytes` is what the limits on sequences and length could fill; more is never taken on a CPU. Raises
    ConfigError when more is asked for than there is.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        room_bytes = free_bytes - peak_activation_bytes
        default_bytes = room_bytes - int(total_bytes * (1 - cache.gpu_memory_utilization))
    else:
        room_bytes = free_host_bytes() // ranks_on_host
        default_bytes = min(useful_bytes, int(room_bytes * CPU_CACHE_SHARE))
    if cache.kv_cache_memory is None:
        return default_bytes
    if cache.kv_cache_memory > room_bytes:
        raise ConfigError("kv_cache_memory", cache.kv_cache_memory, f"each rank has {room_bytes} bytes free")
    return cache.kv_cache_memory


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
