"""Independent replicas: an engine each, in processes of its own, and one front for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

import msgspec

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient, OnProgress
from phalanx.engine.engine import Engine
from phalanx.engine.router import Router
from phalanx.engine.stream import OutputDelta
from phalanx.errors import EngineDeadError
from phalanx.executor.platform import num_cores, pick_device, visible_gpus
from phalanx.protocol import EngineStats, ReplicaStats, SamplingParams, StartProgress


async def start_engine(config: Config, on_progress: OnProgress | None = None) -> Engine:
    """Start what the configuration asks for: an engine, or a fleet of them. Raises what `EngineClient.start` does."""
    parallel = config.parallel
    if parallel.data_parallel_size == 1 or parallel.enable_expert_parallel:
        return await EngineClient.start(config, on_progress)
    return await Fleet.start(config, on_progress)


class Fleet:
    """Gives each request to one of several engines. One that dies takes its requests along; the others go on."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        """Use `start`. Takes over the engines."""
        first = engines[0]
        self.info = msgspec.structs.replace(
            first.info, world_size=sum(engine.info.world_size for engine in engines), num_replicas=len(engines)
        )
        self.tokenizer = first.tokenizer
        self.default_sampling = first.default_sampling
        self._engines = tuple(engines)
        self._router = Router(first.info.block_size)

    @classmethod
    async def start(
        cls, config: Config, on_progress: OnProgress | None = None, *, command: Sequence[str] = ENGINE_COMMAND
    ) -> Fleet:
        """Start all engines at the same time and wait until all serve.

        Raises what the first one that fails raises; then none is left.
        """
        settings = settings_of_replicas(config)
        size = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
        starting = []
        for replica, (own, environment) in enumerate(settings):
            report = _offset(on_progress, replica * size)
            start = EngineClient.start(own, report, command=command, environment=environment)
            starting.append(asyncio.create_task(start))
        try:
            return cls(await asyncio.gather(*starting))
        except BaseException:
            for task in starting:
                task.cancel()
            ended = await asyncio.gather(*starting, return_exceptions=True)
            await asyncio.gather(*(engine.close() for engine in ended if isinstance(engine, EngineClient)))
            raise

    @property
    def stats(self) -> EngineStats | None:
        found = [engine.stats.replicas[0] if engine.stats is not None else None for engine in self._engines]
        if not any(found):
            return None
        nothing = ReplicaStats(0, 0, 0, self.info.num_blocks, 0, 0, 0, 0, 0)
        return EngineStats(tuple(stats or nothing for stats in found))

    @property
    def dead(self) -> str | None:
        reasons = [engine.dead for engine in self._engines]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """As EngineClient.generate, by the replica that suits the request best."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        num_requests = [engine.num_running if engine.dead is None else None for engine in self._engines]
        replica = self._router.pick(prompt_token_ids, num_requests)
        return self._engines[replica].generate(prompt_token_ids, sampling)

    async def close(self, grace_s: float = 0.0) -> None:
        """As EngineClient.close, of all at the same time."""
        await asyncio.gather(*(engine.close(grace_s) for engine in self._engines))


def settings_of_replicas(config: Config) -> list[tuple[Config, Mapping[str, str]]]:
    """Each replica's own configuration and environment: they share out this host's cores and GPUs.

    With Ray every replica gets a placement group of its own. Raises ConfigError if there are too few GPUs.
    """
    num_replicas = config.parallel.data_parallel_size
    own = msgspec.structs.replace(config, parallel=msgspec.structs.replace(config.parallel, data_parallel_size=1))
    if config.executor.launcher == "ray":
        return [(own, {})] * num_replicas
    device = pick_device(config)
    threads = config.executor.threads_per_rank or max(1, num_cores() // config.parallel.world_size)
    own = msgspec.structs.replace(
        own, executor=msgspec.structs.replace(own.executor, device=device, threads_per_rank=threads)
    )
    if device == "cpu":
        return [(own, {})] * num_replicas
    gpus, size = visible_gpus(), own.parallel.world_size
    shares = [gpus[replica * size : (replica + 1) * size] for replica in range(num_replicas)]
    return [(own, {"CUDA_VISIBLE_DEVICES": ",".join(share)}) for share in shares]


def _offset(on_progress: OnProgress | None, first_rank: int) -> Callable[[StartProgress], None] | None:
    """What an engine reports of its ranks, as ranks of all."""
    if on_progress is None:
        return None
    return lambda told: on_progress(msgspec.structs.replace(told, rank=told.rank + first_rank))
