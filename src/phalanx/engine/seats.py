"""What each replica of a fleet gets of this host, cores and GPUs, and whether there is room for more replicas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import msgspec

from phalanx.config import Config, ParallelConfig
from phalanx.errors import ConfigError
from phalanx.executor.platform import num_cores, pick_device, visible_gpus
from phalanx.memory.host import bytes_of_family, free_host_bytes

MAX_REPLICAS = 64

Settings = tuple[Config, Mapping[str, str]]
"""A replica's own configuration, and variables that come over this process's environment."""


def settings_of_replicas(config: Config) -> list[Settings]:
    """Of those that a fleet starts with: they share out this host's cores and GPUs.

    With Ray every replica gets a placement group of its own, and the GPUs are for a Ray of its own, if it starts one.
    Raises ConfigError if there are too few GPUs.
    """
    replicas = config.of_engines()
    if len(replicas) == 1:
        return [(config, {})]
    if config.executor.launcher == "ray":
        return [(own, share) for own, share in zip(replicas, _shares_of_gpus(config), strict=True)]
    device = pick_device(config)
    threads = config.executor.threads_per_rank or max(1, num_cores() // config.parallel.world_size)
    executor = msgspec.structs.replace(config.executor, device=device, threads_per_rank=threads)
    shares = _shares_of_gpus(config) if device == "cuda" else [{}] * len(replicas)
    return [
        (msgspec.structs.replace(own, executor=executor), share) for own, share in zip(replicas, shares, strict=True)
    ]


class Seats:
    """The places that replicas of a fleet may take. A replica's number is its place."""

    def __init__(self, config: Config) -> None:
        """`config` as the fleet is started with. Raises ConfigError if there are too few GPUs for that."""
        self._config = config
        if config.executor.launcher != "ray":  # which knows the nodes' devices
            settled = msgspec.structs.replace(config.executor, device=pick_device(config))
            self._config = msgspec.structs.replace(config, executor=settled)

    @property
    def model(self) -> str:
        """The checkpoint of replicas that join."""
        return self._config.model.model

    def use_model(self, model: str, tokenizer: str) -> None:
        """Replicas that join from now on have this checkpoint; `tokenizer` as for Config.with_model."""
        self._config = self._config.with_model(model, tokenizer)

    def settings(self, number: int, size: int, max_model_len: int) -> Settings:
        """Of one that joins a fleet, which then has `size` replicas. Its requests may be as long as in the others."""
        model = msgspec.structs.replace(self._config.model, max_model_len=max_model_len)
        config = msgspec.structs.replace(self._config, model=model, parallel=self._parallel(max(size, number + 1)))
        return settings_of_replicas(config)[number]

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Replicas that join from now on are to come to other nodes of the cluster."""
        cluster = msgspec.structs.replace(self._config.cluster, avoid_nodes=nodes)
        self._config = msgspec.structs.replace(self._config, cluster=cluster)

    def check_size(self, size: int) -> None:
        """Whether there may be so many, whatever there is room for. Raises ConfigError."""
        if size > MAX_REPLICAS:
            raise ConfigError("data_parallel_size", size, f"at most {MAX_REPLICAS}")
        msgspec.structs.replace(self._config, parallel=self._parallel(size)).refuse_contradictions()

    def check_host(self, size: int, numbers: Sequence[int], pids: Sequence[int], shared_bytes: int = 0) -> None:
        """Whether this host has room for replicas with the new `numbers`, so that there are `size`. Takes up to a
        second.

        `pids` are the engines that run: a new one will take as much memory as the largest of them, less that one's
        share of the `shared_bytes` of weights that all of them may have in common. Raises ConfigError that says what is
        missing. For the nodes of a Ray cluster see room.py.
        """
        if pick_device(self._config) == "cuda":
            self._check_gpus(size, numbers)
        else:
            self._check_cores(size)
        each = max(map(bytes_of_family, pids), default=0) - shared_bytes // max(len(pids), 1)
        needed, free = len(numbers) * max(each, 0), free_host_bytes()
        if needed > free:
            allowed = f"as the replicas are now, that takes {_gib(needed)} more memory, and {_gib(free)} are free"
            raise ConfigError("data_parallel_size", size, allowed)

    def complaint_about(self, number: int) -> str | None:
        """Why this host has no devices any more for a replica that has ended; None if it has."""
        needed, num_gpus = (number + 1) * self._config.parallel.engine_size, len(visible_gpus())
        if self._config.executor.device == "cuda" and needed > num_gpus:
            return f"its GPUs are gone: {needed} are needed for it and those before it, and {num_gpus} can be used"
        return None

    def _parallel(self, size: int) -> ParallelConfig:
        return msgspec.structs.replace(self._config.parallel, data_parallel_size=size)

    def _check_gpus(self, size: int, numbers: Sequence[int]) -> None:
        num_gpus, per_replica = len(visible_gpus()), self._config.parallel.engine_size
        if (max(numbers) + 1) * per_replica > num_gpus:
            allowed = f"{size * per_replica} GPUs are needed and {num_gpus} can be used"
            raise ConfigError("data_parallel_size", size, allowed)

    def _check_cores(self, size: int) -> None:
        ranks, cores = size * self._config.parallel.engine_size, num_cores()
        threads = ranks * (self._config.executor.threads_per_rank or 1)
        if threads > cores:
            each = f"{ranks} ranks" + (f" of {threads // ranks} threads" if threads > ranks else "")
            raise ConfigError("data_parallel_size", size, f"there are {cores} cores, too few for {each}")


def _shares_of_gpus(config: Config) -> list[Mapping[str, str]]:
    """Variables that let each replica see GPUs of its own; none at all if there are too few for all of them."""
    gpus, parallel, per_rank = visible_gpus(), config.parallel, config.cluster.ray_per_worker_gpus
    if not gpus:
        return [{}] * parallel.data_parallel_size
    size = math.ceil(parallel.engine_size * max(per_rank, 1.0))
    if len(gpus) < max(size, parallel.world_size * per_rank):
        size = 0
    dealt = itertools.cycle(gpus)  # at less than a GPU for each rank, replicas may share one
    shares = [list(itertools.islice(dealt, size)) for _ in range(parallel.data_parallel_size)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
