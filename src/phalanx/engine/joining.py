"""Engines that join a fleet: where each starts, with what, and what it says meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from phalanx.config import Config
from phalanx.engine.asked_weights import NONE, may_share_weights
from phalanx.engine.awaiting import end_of
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.engine.incarnation import OnProgress
from phalanx.engine.seats import Seats, settings_of_replicas
from phalanx.engine.weights_source import WeightsSource
from phalanx.errors import PhalanxError, StartError
from phalanx.protocol.client import Sleep, StartProgress


async def start_all(
    config: Config, on_progress: OnProgress | None = None, command: Sequence[str] = ENGINE_COMMAND
) -> list[EngineClient]:
    """Those that a fleet begins with, at the same time. Raises what the first one that fails raises; then none is left.

    With Ray each waits for the one before to be placed: two that choose at the same time would choose the same room.
    """
    starting: list[asyncio.Task[EngineClient]] = []
    try:
        for own, environment in settings_of_replicas(config):
            report = _Report(on_progress, len(starting) * own.parallel.world_size)
            start = EngineClient.start(own, report, command=command, environment=environment)
            starting.append(asyncio.create_task(start))
            if own.executor.launcher == "ray":
                await report.until_placed(starting[-1])
        return await asyncio.gather(*starting)
    except BaseException:
        for task in starting:
            task.cancel()
        ended = await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in ended if isinstance(engine, EngineClient)))
        raise


class Joining:
    """Starts an engine for a replica of a fleet that serves. It is to be as those are that are there."""

    def __init__(self, config: Config, first: EngineClient, source: WeightsSource, command: Sequence[str]) -> None:
        """`config` as the fleet was started with, `first` one of its engines."""
        self.config = config
        self.seats = Seats(config)
        self.info = first.info
        """Of one replica."""
        self.weights_version = first.weights_version
        self.checkpoint = self._first_checkpoint = first.checkpoint
        """That they have."""
        self.told: dict[int, StartProgress] = {}
        """What each that starts has said last."""
        self.starting: set[int] = set()
        """Where these will be is not known yet."""
        self.order: asyncio.Task[None] | None = None
        """A reload, sleep or wake of those that are there: nobody joins meanwhile, or is like nobody afterwards."""
        self._front = first.front
        self._source = source
        self._command = command
        self._placing = asyncio.Lock()
        """On a Ray cluster one starts after the other has its place."""

    def use_weights(self, like: EngineClient) -> None:
        """Those that this one has, from now on."""
        self.weights_version, self.checkpoint = like.weights_version, like.checkpoint
        if like.model != self.config.model.model:
            self.config = self.config.with_model(like.model, self._first_checkpoint)
            self.seats.use_model(like.model, self._first_checkpoint)

    def use_shape(self, like: EngineClient) -> None:
        """As many ranks in each as this one has by now."""
        self.info = like.info
        parallel = msgspec.structs.replace(self.config.parallel, tensor_parallel_size=like.info.tensor_parallel_size)
        self.config = msgspec.structs.replace(self.config, parallel=parallel)
        self.seats = Seats(self.config)

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """From now on on other nodes of the cluster than these."""
        cluster = msgspec.structs.replace(self.config.cluster, avoid_nodes=nodes)
        self.config = msgspec.structs.replace(self.config, cluster=cluster)
        self.seats.avoid(nodes)

    @property
    def may_share_weights(self) -> bool:
        """Whether replicas may have them in common, as far as is known here."""
        return may_share_weights(self.config, self.info.device)

    async def find_weights(self, number: int | None = None) -> bytes:
        """Those that this replica, or any that joins, can have from one that serves, as in protocol.Begin."""
        if not self.may_share_weights:
            return NONE
        return await self._source.find(number, self.weights_version, self.checkpoint)

    async def start(self, number: int, size: int, *, sleep_level: Callable[[], int]) -> EngineClient:
        """One for a replica of a fleet that then has `size`, and in the end sleeps as that does. Raises what
        EngineClient.start does."""
        while self.order is not None and not self.order.done():
            await asyncio.wait([self.order])
        self.starting.add(number)  # before anything is awaited: no order may come between
        starting: asyncio.Task[EngineClient] | None = None
        try:
            own, environment = self.seats.settings(number, size, self.info.max_model_len)
            report = _Report(partial(self.told.__setitem__, number), 0)
            start = partial(
                EngineClient.start,
                own,
                report,
                command=self._command,
                environment=environment,
                front=self._front,
                weights_version=self.weights_version,
                weights=await self.find_weights(number),
            )
            async with self._placing:
                starting = asyncio.create_task(start())
                if own.executor.launcher == "ray":
                    await report.until_placed(starting)
            engine = await starting
            if engine.checkpoint != self.checkpoint:
                await engine.close()
                found = f"its weights are of {engine.checkpoint}, and those of the others of {self.checkpoint}"
                raise StartError(f"replica {number}", "joining", f"{found}: reload, to have the same in all")
            if self.config.cluster.avoid_nodes != own.cluster.avoid_nodes:  # while it started
                engine.avoid(self.config.cluster.avoid_nodes)
            if level := sleep_level():
                await _put_to_sleep(engine, level)
            self._source.attach(number, engine)
            return engine
        except asyncio.CancelledError:
            if starting is not None:
                await _undo(starting)
            raise
        finally:
            self.told.pop(number, None)
            self.starting.discard(number)


async def _put_to_sleep(engine: EngineClient, level: int) -> None:
    """Have one that is new be as the others are."""
    try:
        await engine.maintain(Sleep(2 if level == 2 else 1))
    except PhalanxError:
        await engine.close()
        raise


async def _undo(starting: asyncio.Task[EngineClient]) -> None:
    """Have an engine not start, or end if it has started by now."""
    starting.cancel()
    await end_of(starting)
    if not starting.cancelled() and starting.exception() is None:
        await starting.result().close()


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
