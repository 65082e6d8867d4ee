"""Independent replicas: an engine each, in processes of its own, and one front for all of them, of any number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

import msgspec

from phalanx.config import Config
from phalanx.engine.awaiting import begun
from phalanx.engine.census import Census
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.engine.condition import Condition
from phalanx.engine.draining import Draining
from phalanx.engine.engine import DRAIN_TIMEOUT_S, Engine, ReplicaState, Strength
from phalanx.engine.fleet_maintenance import FleetMaintenance
from phalanx.engine.fleet_resizing import FleetResizing
from phalanx.engine.growth import Growth
from phalanx.engine.incarnation import OnProgress
from phalanx.engine.joining import Joining, start_all
from phalanx.engine.leaving import Leaving
from phalanx.engine.members import Members
from phalanx.engine.room import Room
from phalanx.engine.roster_work import RosterWork
from phalanx.engine.stream import OutputDelta, RequestStream
from phalanx.engine.traffic import Traffic
from phalanx.engine.weights_source import WeightsSource
from phalanx.errors import ConfigError, EngineDeadError, ResizeRefusedError, ResizeUnderWayError
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol.client import EngineStats, MaintenanceOrder
from phalanx.protocol.sampling import SamplingParams

WATCH_POLL_S = 0.02

log = logging.getLogger("phalanx.engine")


async def start_engine(config: Config, on_progress: OnProgress | None = None) -> Engine:
    """Start what the configuration asks for. Raises what `EngineClient.start` does."""
    if config.parallel.enable_expert_parallel:  # replicas that share experts have one brain
        return await EngineClient.start(config, on_progress)
    return await Fleet.start(config, on_progress)


class Fleet:
    """Gives each request to one of several engines, and to another one when that one leaves or dies.

    One whose steps do not progress gets no new requests as long as another one's do.
    """

    def __init__(self, config: Config, engines: Sequence[EngineClient], command: Sequence[str]) -> None:
        """Use `start`. Takes over the engines."""
        first = engines[0]
        self.tokenizer = first.tokenizer
        self.default_sampling = first.default_sampling
        self._members = Members(engines)
        self._roster = self._members.roster
        self._traffic = Traffic(self._members, first.info.block_size)
        self._joining = Joining(config, first, WeightsSource(self._members), command)
        leaving = Leaving(self._traffic, self.tokenizer, is_prefix_caching=config.cache.enable_prefix_caching)
        self._room = Room(self._joining, Census(config.cluster))
        self._work = RosterWork(self._members, self._joining, leaving, self._traffic, self._room, self._note_change)
        self._maintenance = FleetMaintenance(self._members, self._joining, self._traffic)
        self._resizing = FleetResizing(self._members, self._work, self._room, self._check_now)
        self._draining = Draining(self._members, self._joining, self._room, self._resizing)
        self._growth = Growth(self._members, self._resizing, lambda: self._is_idle)
        self._grows = config.healing.auto_grow
        self._is_closing = False
        self._is_reshaping = False
        """Whether the one replica is getting ranks of another TP size."""
        self._tending = [asyncio.create_task(self._watch())]
        if self._grows:
            self._tending.append(asyncio.create_task(self._growth.run()))
        self._note_change()

    @classmethod
    async def start(
        cls, config: Config, on_progress: OnProgress | None = None, *, command: Sequence[str] = ENGINE_COMMAND
    ) -> Fleet:
        """Start all engines at the same time and wait until all serve.

        Raises what the first one that fails raises; then none is left.
        """
        return cls(config, await start_all(config, on_progress, command), command)

    @property
    def stats(self) -> EngineStats | None:
        return self._members.stats(self.info.num_blocks)

    @property
    def dead(self) -> str | None:
        return self._members.dead

    @property
    def down(self) -> str | None:
        return self._members.down

    @property
    def asleep(self) -> int:
        """As EngineClient.asleep, of all that live."""
        return self._members.asleep

    @property
    def num_running(self) -> int:
        return self._members.num_running

    def conditions(self) -> Sequence[Condition]:
        return self._members.conditions()

    def statuses(self) -> Sequence[InstanceStatus]:
        return self._members.statuses()

    @property
    def strength(self) -> Strength:
        return Strength(
            wanted=self._roster.wanted,
            num_missing=self._roster.num_missing,
            missing_because=self._roster.missing_because,
            num_lost=self._roster.num_lost,
            num_grown=self._growth.num_grown,
            grows=self._grows,
            drained_nodes=self._draining.drained,
        )

    def replicas(self) -> Sequence[ReplicaState]:
        return [self._with_progress(one) for one in self._members.replicas()]

    def _with_progress(self, one: ReplicaState) -> ReplicaState:
        told = self._joining.told.get(one.replica)
        if told is None:
            return one
        return msgspec.structs.replace(one, phase=told.phase, done=told.done, total=told.total)

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """As EngineClient.generate, by the replica that suits the request best when iteration begins."""
        checked = self._members.engines[self._members.living()[0]].check(prompt_token_ids, sampling)
        return self._traffic.deltas(RequestStream(self.tokenizer, prompt_token_ids, checked))

    async def until_settled(self) -> None:
        """As EngineClient.until_settled, of any that is not dead."""
        await self._members.until_settled()

    async def maintain(self, order: MaintenanceOrder) -> None:
        """As EngineClient.maintain."""
        await self._maintenance.carry_out(order)

    async def resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        resizing = await self.begin_resize(
            data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            leaving=leaving,
            drain_timeout_s=drain_timeout_s,
        )
        await resizing

    async def begin_resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> asyncio.Task[None]:
        size = self._roster.size if data_parallel_size is None else data_parallel_size
        now = self._joining.config.parallel.tensor_parallel_size
        self._check_now()
        self._draining.check_none()
        await self._growth.give_way()
        self._check_now()  # others may have waited for that, too
        self._roster.check(size, leaving, self._members.numbers_down())
        if tensor_parallel_size not in (None, now):
            return await self._begin_to_reshape(size, tensor_parallel_size)
        return await self._resizing.begin(size, leaving, drain_timeout_s=drain_timeout_s)

    async def begin_drain(self, node: str, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> asyncio.Task[None]:
        self._check_now()
        await self._growth.give_way()
        self._check_now()  # others may have waited for that, too
        return await self._draining.begin(node, drain_timeout_s)

    async def undo_drain(self, node: str) -> None:
        await self._draining.undo(node)

    async def close(self, grace_s: float = 0.0) -> None:
        """As EngineClient.close, of all at the same time."""
        self._is_closing = True
        self._traffic.close()
        self._resizing.close()
        for task in self._tending:
            task.cancel()
        try:
            await self._work.close()
            await self._room.close()
        finally:
            await asyncio.gather(*(engine.close(grace_s) for engine in self._members.engines.values()))

    async def _begin_to_reshape(self, size: int, tensor_parallel_size: int | None) -> asyncio.Task[None]:
        """Have other ranks take over what the one replica does. Raises ConfigError if there are several."""
        if size > 1 or self._roster.size > 1:
            there_are = f"there are {self._roster.size}" if self._roster.size > 1 else f"there are to be {size}"
            allowed = f"only one replica can change it, and {there_are}: change one after the other"
            raise ConfigError("tensor_parallel_size", tensor_parallel_size, allowed)
        engine = self._members.engines[self._members.living()[0]]
        self._is_reshaping = True
        try:
            reshaping = await engine.begin_resize(tensor_parallel_size=tensor_parallel_size)
        except BaseException:
            self._is_reshaping = False
            raise
        return await begun(self._see_reshaped(engine, reshaping))

    async def _see_reshaped(self, engine: EngineClient, reshaping: asyncio.Task[None]) -> None:
        """Wait for the end of it: replicas to come are like this one."""
        try:
            await reshaping
        finally:
            self._is_reshaping = False
            self._joining.use_shape(engine)
            self._note_change()

    def _check_shape(self) -> None:
        """Raises ResizeUnderWayError."""
        if self._is_reshaping:
            size = self._joining.config.parallel.tensor_parallel_size
            raise ResizeUnderWayError(f"tensor_parallel_size {size}", "another one")

    def _check_now(self) -> None:
        """Whether a resize may begin. Raises EngineDeadError, ResizeRefusedError."""
        if self._is_closing:
            raise EngineDeadError("the engine is shutting down")
        self._check_shape()
        if self.asleep or self._maintenance.is_under_way:
            raise ResizeRefusedError("the engine is asleep, or is just getting other weights: resize when it serves")

    @property
    def _is_idle(self) -> bool:
        is_busy = self._is_reshaping or self._draining.is_under_way or self._maintenance.is_under_way or self.asleep
        return self._roster.resize is None and not is_busy

    def _note_change(self) -> None:
        """Something about the replicas has changed."""
        size, one = self._roster.size, self._joining.info
        self.info = msgspec.structs.replace(one, world_size=size * one.world_size, num_replicas=size)
        self._resizing.note_change()

    async def _watch(self) -> None:
        """See that requests of a replica that has ended go on in others, and that another engine takes its place."""
        while True:
            for number, engine in list(self._members.engines.items()):
                if engine.down is not None:
                    self._traffic.forget(number)  # what it had in its cache is lost
                    self._traffic.move_from(number)
                if engine.lacks_room is not None and self._may_lose(number):
                    self._work.lose(number, engine.lacks_room)
                elif engine.dead is not None and self._roster.counts_on(number):
                    self._note_death(number, engine.dead)
            if orders := self._roster.restarting(self._members.numbers_down()):
                self._work.carry_out(orders)
            await asyncio.sleep(WATCH_POLL_S)

    def _may_lose(self, number: int) -> bool:
        """Whether others serve without this one: the last one waits for room as long as it may."""
        return number in self._roster.members() and self._roster.serving() not in ([], [number])

    def _note_death(self, number: int, reason: str) -> None:
        engines = self._members.engines.values()
        num_alive = sum(engine.dead is None for engine in engines)
        log.error("replica %d has ended, %d of %d go on: %s", number, num_alive, len(engines), reason)
        self._work.carry_out(self._roster.died(number, reason))
