"""Other weights, sleep and wake, as an operator or a training loop asks for them."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from phalanx.engine.condition import Condition
from phalanx.errors import NotNowError
from phalanx.protocol.client import MaintenanceOrder, Reload, Sleep, Wake, When
from phalanx.server.service import Service

Path = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0.0, le=1e6)]

RELOAD_TIMEOUT_S = 600.0

OrderName = Literal["reload", "sleep", "wake"]

log = logging.getLogger(__name__)


class ReloadRequest(msgspec.Struct, kw_only=True):
    """`POST /reload`"""

    model: Path | None = None
    """A directory where the engine runs; left out, the files in use are read again."""
    when: When = "now"
    """`idle` lets requests that run end with the old weights; others wait for the new ones."""
    timeout_s: Seconds = RELOAD_TIMEOUT_S
    """For the reading, and for those requests to end."""


class SleepRequest(msgspec.Struct, kw_only=True):
    """`POST /sleep`"""

    level: Literal[1, 2] = 1
    """1 gives the memory of the KV cache back, 2 that of the weights too."""


class WakeRequest(msgspec.Struct, kw_only=True):
    """`POST /wake`"""

    model: Path | None = None
    """At level 2: a directory whose weights are to be used."""


class EngineMaintenance(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Of one engine: of all replicas in lockstep, or of the replica with this number."""

    engine: int
    weights_version: int
    epoch: int
    state: str
    """`serving`, `restarting`, `asleep`, or what is being done to it."""
    level: int = 0
    """Of its sleep."""
    done: int = 0
    """Of `total` bytes, while weights are read."""
    total: int = 0


class LastOrder(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A reload, sleep or wake that is under way, or was the last one."""

    order: OrderName
    state: Literal["running", "done", "failed"]
    took_s: float
    """So far, while it is running."""
    error: str | None = None


class MaintenanceReport(msgspec.Struct, kw_only=True):
    """`GET /maintenance`, and what the orders answer when they are done."""

    engines: tuple[EngineMaintenance, ...]
    last: LastOrder | None


class Upkeep:
    """Passes orders on to one service's engine, and knows what became of them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: LastOrder | None = None
        self._began_at = 0.0

    async def reload(self, asked: ReloadRequest) -> MaintenanceReport:
        """As `Engine.maintain`."""
        return await self._carry_out("reload", Reload(asked.model, asked.when, asked.timeout_s))

    async def sleep(self, asked: SleepRequest) -> MaintenanceReport:
        """As `Engine.maintain`."""
        return await self._carry_out("sleep", Sleep(asked.level))

    async def wake(self, asked: WakeRequest) -> MaintenanceReport:
        """As `Engine.maintain`."""
        return await self._carry_out("wake", Wake(asked.model))

    def report(self) -> MaintenanceReport:
        if self._last is not None and self._last.state == "running":
            self._last.took_s = self._taken_s()
        return MaintenanceReport(
            engines=tuple(map(_maintenance_of, self._service.engine.conditions())),
            last=self._last,
        )

    async def _carry_out(self, name: OrderName, order: MaintenanceOrder) -> MaintenanceReport:
        """Goes on to its end also if its client leaves."""
        if self._last is not None and self._last.state == "running":
            raise NotNowError(f"a {self._last.order} is under way")
        self._last, self._began_at = LastOrder(order=name, state="running", took_s=0.0), time.monotonic()
        working = asyncio.create_task(self._service.engine.maintain(order))
        working.add_done_callback(partial(self._note_end, self._last))
        await asyncio.shield(working)
        return self.report()

    def _note_end(self, last: LastOrder, working: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError("the server stops") if working.cancelled() else working.exception()
        last.state, last.took_s = "done" if error is None else "failed", self._taken_s()
        self._service.metrics.note_maintenance(last.order, has_failed=error is not None, took_s=last.took_s)
        if error is None:
            log.info("%s: done after %.1f s", last.order, last.took_s)
        else:
            last.error = str(error)
            log.warning("%s: failed after %.1f s: %s", last.order, last.took_s, error)

    def _taken_s(self) -> float:
        return round(time.monotonic() - self._began_at, 3)


def _maintenance_of(one: Condition) -> EngineMaintenance:
    is_up = one.down is None and one.dead is None  # a dead one is started again, or is on its way out
    told = EngineMaintenance(
        engine=one.replica,
        weights_version=one.weights_version,
        epoch=one.epoch,
        state="serving" if is_up else "restarting",
        level=one.sleep_level,
    )
    if one.maintenance is None or not is_up:  # what was done to the engine before is over
        return told
    doing = one.maintenance
    return msgspec.structs.replace(told, state=doing.phase, done=doing.done, total=doing.total)
