"""Independent replicas: an engine each, in processes of its own, and one front for all of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import msgspec

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.engine.condition import Condition
from phalanx.engine.engine import Engine
from phalanx.engine.incarnation import OnProgress
from phalanx.engine.router import Router
from phalanx.engine.stream import OutputDelta
from phalanx.errors import EngineDeadError
from phalanx.executor.platform import num_cores, pick_device, visible_gpus
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol import EngineStats, ReplicaStats, SamplingParams, StartProgress

DEATH_POLL_S = 0.1

log = logging.getLogger("phalanx.engine")


async def start_engine(config: Config, on_progress: OnProgress | None = None) -> Engine:
    """Start what the configuration asks for: an engine, or a fleet of them. Raises what `EngineClient.start` does."""
    parallel = config.parallel
    if parallel.data_parallel_size == 1 or parallel.enable_expert_parallel:
        return await EngineClient.start(config, on_progress)
    return await Fleet.start(config, on_progress)


class Fleet:
    """Gives each request to one of several engines. One that has ended is started again by itself, while the others go
    on; one that cannot be takes its requests along.

    One whose steps do not progress gets no new requests as long as another one's do.
    """

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        """Use `start`. Takes over the engines."""
        first = engines[0]
        self.info = msgspec.structs.replace(
            first.info, world_size=sum(engine.info.world_size for engine in engines), num_replicas=len(engines)
        )
        self.tokenizer = first.tokenizer
        self.default_sampling = first.default_sampling
        self._engines = tuple(engines)
        self._router = Router(first.info.block_size, len(engines))
        self._deaths = asyncio.create_task(self._tell_deaths())

    @classmethod
    async def start(
        cls, config: Config, on_progress: OnProgress | None = None, *, command: Sequence[str] = ENGINE_COMMAND
    ) -> Fleet:
        """Start all engines at the same time and wait until all serve.

        With Ray each waits for the one before to be placed: two that choose at the same time would choose the same
        room. Raises what the first one that fails raises; then none is left.
        """
        starting: list[asyncio.Task[EngineClient]] = []
        try:
            for own, environment in settings_of_replicas(config):
                report = _Report(on_progress, len(starting) * own.parallel.world_size)
                start = EngineClient.start(own, report, command=command, environment=environment)
                starting.append(asyncio.create_task(start))
                if own.executor.launcher == "ray":
                    await report.until_placed(starting[-1])
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
    def down(self) -> str | None:
        living = [engine for engine in self._engines if engine.dead is None]
        reasons = [engine.down for engine in living if engine.down is not None]
        return "; ".join(reasons) if living and len(reasons) == len(living) else None

    def conditions(self) -> Sequence[Condition]:
        return [engine.condition for engine in self._engines]

    def statuses(self) -> Sequence[InstanceStatus]:
        return [status for engine in self._engines for status in engine.statuses()]

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """As EngineClient.generate, by the replica that suits the request best when iteration begins."""
        return self._deltas(prompt_token_ids, self._living()[0].check(prompt_token_ids, sampling))

    async def until_settled(self) -> None:
        """As EngineClient.until_settled, of any that is not dead."""
        while self.down is not None:
            waits = [asyncio.create_task(engine.until_settled()) for engine in self._engines if engine.dead is None]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def close(self, grace_s: float = 0.0) -> None:
        """As EngineClient.close, of all at the same time."""
        self._deaths.cancel()
        await asyncio.gather(*(engine.close(grace_s) for engine in self._engines))

    async def _deltas(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[OutputDelta, None]:
        self._living()
        takes_more = [condition.is_healthy for condition in self.conditions()]
        if not any(takes_more):  # one in trouble may come out of it
            takes_more = [engine.dead is None for engine in self._engines]
        num_requests = [
            engine.num_running if takes else None for engine, takes in zip(self._engines, takes_more, strict=True)
        ]
        # Nothing comes between this and the request's beginning, from which on it counts as one of that replica.
        engine = self._engines[self._router.pick(prompt_token_ids, num_requests)]
        async with aclosing(engine.generate_checked(prompt_token_ids, sampling)) as deltas:
            async for delta in deltas:
                yield delta

    def _living(self) -> list[EngineClient]:
        """At least one. Raises EngineDeadError if none is left."""
        living = [engine for engine in self._engines if engine.dead is None]
        if not living:
            raise EngineDeadError(str(self.dead))
        return living

    async def _tell_deaths(self) -> None:
        """Say which engine has died: as long as others go on, only its own requests end with an error."""
        alive = dict(enumerate(self._engines))
        while alive:
            for replica in [replica for replica, engine in alive.items() if engine.dead is not None]:
                reason = alive.pop(replica).dead
                log.error("replica %d has ended, %d of %d go on: %s", replica, len(alive), len(self._engines), reason)
            await asyncio.sleep(DEATH_POLL_S)


def settings_of_replicas(config: Config) -> list[tuple[Config, Mapping[str, str]]]:
    """Each replica's own configuration and environment: they share out this host's cores and GPUs.

    With Ray every replica gets a placement group of its own, and the GPUs are for a Ray of its own, if it starts one.
    Raises ConfigError if there are too few GPUs.
    """
    replicas = config.of_engines()
    if config.executor.launcher == "ray":
        return [(own, share) for own, share in zip(replicas, _shares_of_gpus(config), strict=True)]
    device = pick_device(config)
    threads = config.executor.threads_per_rank or max(1, num_cores() // config.parallel.world_size)
    executor = msgspec.structs.replace(config.executor, device=device, threads_per_rank=threads)
    shares = _shares_of_gpus(config) if device == "cuda" else [{}] * len(replicas)
    return [
        (msgspec.structs.replace(own, executor=executor), share) for own, share in zip(replicas, shares, strict=True)
    ]


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


class _Report:
    """Tells what an engine reports of its ranks as ranks of all, and when they have their places."""

    def __init__(self, on_progress: OnProgress | None, first_rank: int) -> None:
        self._on_progress = on_progress
        self._first_rank = first_rank
        self._placed = asyncio.Event()

    def __call__(self, told: StartProgress) -> None:
        if told.node:
            self._placed.set()
        if self._on_progress is not None:
            self._on_progress(msgspec.structs.replace(told, rank=told.rank + self._first_rank))

    async def until_placed(self, start: asyncio.Task[EngineClient]) -> None:
        """Wait until the ranks have their places, or the start has ended, whichever is first."""
        placed = asyncio.create_task(self._placed.wait())
        try:
            await asyncio.wait((placed, start), return_when=asyncio.FIRST_COMPLETED)
        finally:
            placed.cancel()
