"""Other weights, sleep and wake of a whole fleet: who is to do it when, and what those have that join later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import msgspec

from phalanx.engine.asked_weights import NONE
from phalanx.engine.client import EngineClient
from phalanx.engine.joining import Joining
from phalanx.engine.members import Members
from phalanx.engine.traffic import Traffic
from phalanx.errors import NotNowError
from phalanx.protocol import MaintenanceOrder, Reload, Wake

log = logging.getLogger("phalanx.engine")


class FleetMaintenance:
    """One order at a time."""

    def __init__(self, members: Members, joining: Joining, traffic: Traffic) -> None:
        self._members = members
        self._joining = joining
        self._traffic = traffic
        self._task: asyncio.Task[None] | None = None

    @property
    def is_under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    async def carry_out(self, order: MaintenanceOrder) -> None:
        """As EngineClient.maintain. All sleep and wake at the same time; weights are replaced in one after the other.

        If that fails in one of them, those before it have the new weights: `conditions` tells, and asking again brings
        them into all.
        """
        self._members.living()
        if self._members.roster.resize is not None:
            raise NotNowError("a resize is under way")
        if self.is_under_way:
            raise NotNowError("another reload, sleep or wake is under way")
        if down := self._members.numbers_down():
            raise NotNowError(f"replicas are being started again: {', '.join(map(str, down))}")
        engines = {number: engine for number, engine in self._members.active().items() if engine.dead is None}
        work = self._reload(order, engines) if isinstance(order, Reload) else self._all(order, engines)
        self._task = asyncio.create_task(work)
        await asyncio.shield(self._task)

    async def _reload(self, order: Reload, engines: Mapping[int, EngineClient]) -> None:
        version = 1 + max(engine.weights_version for engine in engines.values())
        weights = NONE
        for number, engine in engines.items():
            log.info("replica %d gets weights of version %d", number, version)
            await engine.maintain(msgspec.structs.replace(order, weights=weights), weights_version=version)
            if not weights and self._joining.may_share_weights:
                weights = await engine.share_weights()
            self._traffic.forget(number)  # its cache is empty
        self._joining.use_weights(version, engine.model)

    async def _all(self, order: MaintenanceOrder, engines: Mapping[int, EngineClient]) -> None:
        """Weights are read by one that wakes, where the others can have them from it.

        Raises what the first one raises that fails, when all are done.
        """
        version = 1 + max(engine.weights_version for engine in engines.values())
        first, *others = engines.values()
        outcomes: list[BaseException | None] = []
        if isinstance(order, Wake) and first.asleep == 2 and others and self._joining.may_share_weights:
            outcomes += await _each(order, [first], version)
            order = msgspec.structs.replace(order, weights=await first.share_weights())
        else:
            others = [first, *others]
        outcomes += await _each(order, others, version)
        for number in engines:
            self._traffic.forget(number)
        if errors := [outcome for outcome in outcomes if outcome is not None]:
            raise errors[0]
        first = next(iter(engines.values()))
        self._joining.use_weights(first.weights_version, first.model)


async def _each(
    order: MaintenanceOrder, engines: Sequence[EngineClient], version: int
) -> Sequence[BaseException | None]:
    """Of all at the same time, what each has failed with, if it has."""
    work = [engine.maintain(order, weights_version=version) for engine in engines]
    return await asyncio.gather(*work, return_exceptions=True)
