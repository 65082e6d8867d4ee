"""How much memory a rank may take, and how many KV cache blocks that makes."""

from __future__ import annotations

import torch

from phalanx.config import CacheConfig
from phalanx.errors import ConfigError
from phalanx.memory.host import free_host_bytes

CPU_CACHE_SHARE = 0.25
"""Share of the host's free memory that all ranks' KV caches take by default. It is touched only as it fills."""

LINE_BYTES = 3 << 29
"""What each line takes of a GPU beside weights, cache, graphs and activations: a CUDA context and NCCL's buffers."""


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
