"""Other weights, sleep and wake of a whole fleet: who is to do it when, and what those have that join later."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from phalanx.engine.asked_weights import NONE
from phalanx.engine.client import EngineClient
from phalanx.engine.joining import Joining
from phalanx.engine.members import Members
from phalanx.engine.traffic import Traffic
from phalanx.errors import MaintenanceError, NotNowError, PhalanxError
from phalanx.protocol.client import FIRST_WEIGHTS_VERSION, MaintenanceOrder, Reload, Sleep, Wake

log = logging.getLogger("phalanx.engine")


class _Before(NamedTuple):
    """What an engine had before its weights were replaced."""

    engine: EngineClient
    checkpoint: str
    version: int


class FleetMaintenance:
    """One order at a time."""

    def __init__(self, members: Members, joining: Joining, traffic: Traffic) -> None:
        self._members = members
        self._joining = joining
        self._traffic = traffic
        self._task: asyncio.Task[None] | None = None
        self._latest_version = FIRST_WEIGHTS_VERSION

    @property
    def is_under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    async def carry_out(self, order: MaintenanceOrder) -> None:
        """As EngineClient.maintain. All sleep and wake at the same time; weights are replaced in one after the other.

        If that fails in one of them, those before it get their old ones back.
        """
        self._members.living()
        if self._members.roster.resize is not None:
            raise NotNowError("a resize is under way")
        if self.is_under_way:
            raise NotNowError("another reload, sleep or wake is under way")
        if starting := sorted({*self._members.numbers_down(), *self._joining.starting}):
            raise NotNowError(f"replicas are being started again: {', '.join(map(str, starting))}")
        engines = {number: engine for number, engine in self._members.active().items() if engine.dead is None}
        work = self._reload(order, engines) if isinstance(order, Reload) else self._all(order, engines)
        self._task = self._joining.order = asyncio.create_task(work)
        await asyncio.shield(self._task)

    async def _reload(self, order: Reload, engines: Mapping[int, EngineClient]) -> None:
        version = self._next_version(engines)
        replaced: dict[int, _Before] = {}
        weights = NONE
        for number, engine in engines.items():
            log.info("replica %d is to get weights of version %d", number, version)
            before = _Before(engine, engine.checkpoint, engine.weights_version)
            try:
                await engine.maintain(msgspec.structs.replace(order, weights=weights), weights_version=version)
            except PhalanxError as error:
                await self._roll_back(order, replaced, error)
                raise
            self._latest_version = version
            replaced[number] = before
            if not weights and self._joining.may_share_weights:
                weights = await engine.share_weights()
            self._traffic.forget(number)  # its cache is empty
        self._joining.use_weights(engine)

    async def _roll_back(self, order: Reload, replaced: Mapping[int, _Before], error: PhalanxError) -> None:
        """Bring their old weights back into those that have new ones. Raises MaintenanceError if that cannot be."""
        left: list[str] = []
        for number, before in replaced.items():
            try:
                if before.engine.checkpoint == before.checkpoint:
                    raise MaintenanceError("the new weights have overwritten the files of the old ones")
                back = Reload(before.checkpoint, "now", order.timeout_s)
                await before.engine.maintain(back, weights_version=before.version)
            except PhalanxError as failure:
                left.append(f"replica {number} ({failure})")
            self._traffic.forget(number)
        if left:
            raise MaintenanceError(
                f"{error}; the new weights stay in {', '.join(left)}: ask again, to have them in all"
            ) from error

    def _next_version(self, engines: Mapping[int, EngineClient]) -> int:
        """One that no weights have had, not even those that were taken back."""
        return 1 + max(self._latest_version, *(engine.weights_version for engine in engines.values()))

    async def _all(self, order: Sleep | Wake, engines: Mapping[int, EngineClient]) -> None:
        """Weights are read by one that wakes, where the others can have them from it.

        Raises what the first one raises that fails, when all are done, and those that have not are as before.
        """
        version = self._next_version(engines)
        if isinstance(order, Wake):
            order, version = self._wake_alike(_check_wake(order, engines), list(engines.values()), version)
        levels = {number: engine.asleep for number, engine in engines.items()}
        asked = {number: engine for number, engine in engines.items() if isinstance(order, Sleep) or engine.asleep}
        if errors := await self._carry_out_in(order, asked or engines, version):
            await self._undo(engines, levels, errors[0])
            raise errors[0]
        if isinstance(order, Sleep):
            return
        first, *others = engines.values()
        if different := [one.checkpoint for one in others if one.checkpoint != first.checkpoint]:
            raise MaintenanceError(
                f"weights of {first.checkpoint} serve, and of {different[0]}: reload one, to have it in all"
            )
        self._joining.use_weights(first)

    async def _carry_out_in(
        self, order: Sleep | Wake, engines: Mapping[int, EngineClient], version: int
    ) -> list[BaseException]:
        """What they have failed with."""
        for number in engines:
            self._traffic.forget(number)
        outcomes: list[BaseException | None] = []
        left = list(engines.values())
        may_share = isinstance(order, Wake) and self._joining.may_share_weights
        if may_share and len(left) > 1 and left[0].asleep == 2:
            first = left.pop(0)
            outcomes += await _each(order, [first], version)
            order = msgspec.structs.replace(order, weights=await first.share_weights())
        outcomes += await _each(order, left, version)
        return [outcome for outcome in outcomes if outcome is not None]

    def _wake_alike(self, order: Wake, engines: Sequence[EngineClient], version: int) -> tuple[Wake, int]:
        """The order by which all get the same weights, and their version: after a wake with others that was undone,
        some have these already."""
        own = self._joining.checkpoint
        if order.model in (None, own) and any(one.asleep == 2 and one.checkpoint != own for one in engines):
            return msgspec.structs.replace(order, model=own), self._joining.weights_version
        known = [one.weights_version for one in engines if one.checkpoint == order.model != own]
        return order, max(known, default=version)

    async def _undo(self, engines: Mapping[int, EngineClient], levels: Mapping[int, int], error: BaseException) -> None:
        """Have all sleep as they did, or wake as they were. Raises MaintenanceError if that cannot be."""
        left: list[str] = []
        for number, engine in engines.items():
            try:
                if engine.asleep > levels[number]:
                    await engine.maintain(Wake(None))
                if 0 < levels[number] != engine.asleep:
                    await engine.maintain(Sleep(2 if levels[number] == 2 else 1))
            except PhalanxError as failure:
                left.append(f"replica {number} is {'asleep' if engine.asleep else 'awake'} ({failure})")
        if left:
            raise MaintenanceError(f"{error}; {', '.join(left)}: ask again") from error


def _check_wake(order: Wake, engines: Mapping[int, EngineClient]) -> Wake:
    """With the weights by their path, links resolved, as engines tell theirs.

    Raises NotNowError if only some would have them: who is awake gets others by a reload.
    """
    if order.model is None:
        return order
    directory = Path(os.path.expanduser(order.model))
    path = str(directory.resolve()) if directory.is_dir() else order.model
    awake = {number: engine for number, engine in engines.items() if not engine.asleep}
    if len(awake) < len(engines):
        for number, engine in awake.items():
            if engine.checkpoint != path:
                raise NotNowError(
                    f"replica {number} is awake, with weights of {engine.checkpoint}: wake the others, then reload"
                )
    return msgspec.structs.replace(order, model=path)


async def _each(
    order: MaintenanceOrder, engines: Sequence[EngineClient], version: int
) -> Sequence[BaseException | None]:
    """Of all at the same time, what each has failed with, if it has."""
    work = [engine.maintain(order, weights_version=version) for engine in engines]
    return await asyncio.gather(*work, return_exceptions=True)
