"""How much memory a rank may take, and how many KV cache blocks that makes."""

from __future__ import annotations

from pathlib import Path

import torch

from phalanx.config import CacheConfig
from phalanx.errors import ConfigError

CPU_CACHE_SHARE = 0.25
"""Share of the host's free memory that all ranks' KV caches take by default. It is touched only as it fills."""


def free_host_bytes() -> int:
    """Memory that this process may still take: the system's, or less where a control group sets a limit."""
    free_bytes = _meminfo_bytes("MemAvailable")
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(limit_file), _read(used_file)
        if limit.isdigit() and used.isdigit():
            free_bytes = min(free_bytes, int(limit) - int(used))
    return max(free_bytes, 0)


def cache_bytes(
    cache: CacheConfig, device: torch.device, *, useful_bytes: int, peak_activation_bytes: int, ranks_on_host: int
) -> int:
    """Bytes that one rank may use for its KV cache.

    `useful_bytes` is what the limits on sequences and length could fill; more is never taken on a CPU. Raises
    ConfigError when more is asked for than there is.
    """
    if cache.kv_cache_memory is not None:
        free_bytes = free_host_bytes() // ranks_on_host if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
        if cache.kv_cache_memory > free_bytes:
            raise ConfigError("kv_cache_memory", cache.kv_cache_memory, f"each rank has {free_bytes} bytes free")
        return cache.kv_cache_memory
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget_bytes = int(total_bytes * cache.gpu_memory_utilization)
        return budget_bytes - (total_bytes - free_bytes) - peak_activation_bytes
    return min(useful_bytes, int(free_host_bytes() * CPU_CACHE_SHARE) // ranks_on_host)


def _meminfo_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise AssertionError(f"/proc/meminfo has no {field}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # no such control group here
        return ""
