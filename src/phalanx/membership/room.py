"""Whether there is room for a line of another size, on this host or on a cluster's nodes, found out before any process
of it is started."""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.config import Config
from phalanx.errors import ConfigError, PlacementError
from phalanx.executor.platform import num_cores, visible_gpus
from phalanx.membership.resize import Size
from phalanx.memory.host import bytes_of_family, free_host_bytes

MOST_OF_TWO = 0.5
"""Share of a GPU's memory that a line may take, for another one to be prepared beside it."""


def shares_devices(config: Config) -> bool:
    """Whether ranks of two lines have room beside each other on a device."""
    cache = config.cache
    has_gpus = config.executor.device == "cuda"
    return not has_gpus or cache.kv_cache_memory is not None or cache.gpu_memory_utilization <= MOST_OF_TWO


def check_devices(config: Config, before: Size) -> None:
    """`config` is that of the size asked for. Raises ConfigError that says what is missing: cores, or GPUs."""
    if config.executor.device == "cuda":
        _check_gpus(config, before)
        return
    ranks, cores = config.parallel.world_size, num_cores()
    each = config.executor.threads_per_rank or 1
    if ranks * each > cores:
        needed = f"{ranks} ranks" + (f" of {each} threads" if each > 1 else "")
        raise _no_room(config, before, f"there are {cores} cores, too few for {needed}")


def check_memory(config: Config, before: Size, pids: Iterable[int]) -> None:
    """`pids` are those of the ranks that serve; they stay until the others take over. Raises ConfigError. Takes
    milliseconds for each gigabyte that they have.

    Weights are shared out to the ranks of a replica, and experts to all ranks: so a line of no more replicas takes no
    more than the one that there is, and one of more replicas as much more at most. Of GPUs only the start can tell.
    """
    if config.executor.device == "cuda":
        return
    more = max(config.parallel.data_parallel_size / before.data_parallel_size, 1.0)
    needed, free = int(more * sum(map(bytes_of_family, pids))), free_host_bytes()
    if needed > free:
        allowed = (
            f"as the ranks are now, those that are to take over take {_gib(needed)} more memory, and {_gib(free)} are "
            "free"
        )
        raise _no_room(config, before, allowed)


def _check_gpus(config: Config, before: Size) -> None:
    ranks, gpus = config.parallel.world_size, len(visible_gpus())
    if ranks > gpus:
        raise _no_room(config, before, f"{ranks} GPUs are needed and {gpus} can be used")
    if not shares_devices(config):
        raise _no_room(config, before, f"ranks are prepared beside those that serve, and {_how_to_share(config)}")


def no_places(config: Config, before: Size, error: PlacementError) -> ConfigError:
    """What the nodes of a cluster have too little of."""
    if shares_devices(config):
        counted = "bundles of Phalanx's own that the ranks that serve have count as free here"
    else:
        counted = f"what the ranks that serve have is not free for those that take over, since {_how_to_share(config)}"
    return _no_room(config, before, f"{error.complaint} ({counted})\n{error.table}")


def _how_to_share(config: Config) -> str:
    return (
        f"either take gpu_memory_utilization ({config.cache.gpu_memory_utilization:g}) of a GPU: start with "
        f"{MOST_OF_TWO:g} or less, or with kv_cache_memory"
    )


def _no_room(config: Config, before: Size, allowed: str) -> ConfigError:
    """Names what is asked to change."""
    parallel = config.parallel
    if parallel.data_parallel_size != before.data_parallel_size:
        return ConfigError("data_parallel_size", parallel.data_parallel_size, allowed)
    return ConfigError("tensor_parallel_size", parallel.tensor_parallel_size, allowed)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
