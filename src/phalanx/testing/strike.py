"""A blow as it is struck: from its preparation to the end of what it sets off."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import msgspec

from phalanx.config import Config
from phalanx.engine.client import EngineClient
from phalanx.errors import ConfigError, EngineDeadError, MaintenanceError, NotNowError, ResizeError, ResizeRefusedError
from phalanx.ledger.status import InstanceStatus
from phalanx.membership.resize import Size
from phalanx.membership.room import check_devices
from phalanx.protocol.client import FormationStats, Reload
from phalanx.testing.blows import Blow, BlowKind
from phalanx.testing.holdings import children_of, command_of, parent_of
from phalanx.testing.mailbox import Mailbox
from phalanx.testing.reach import Place, Reach

NEXT_S = 5.0
"""For the ranks to come that take over."""
SWITCH_S = 0.2
"""Within that time after the first one, the second kill of a switch comes."""
RELOAD_S = 0.15
"""Within that time after the order, a kill during a reload comes: a tiny checkpoint is soon read."""
RESIZE_S = 1.0
"""Likewise: processes have to be started for a resize."""
ORDER_S = 60.0
"""For a reload or a resize to end, whichever way."""
AGAIN_S = 0.2
"""From one try to bring the size back to the next one."""
LOOK_S = 0.01

_WATCHER = b"phalanx.executor.watcher_process"


class Before(msgspec.Struct, frozen=True):
    """How the engine was before a blow."""

    status: InstanceStatus
    places: dict[int, Place]
    """Of the ranks that compute."""
    stats: FormationStats
    num_restarts: int
    num_watcher_restarts: int
    num_memory_kills: int | None
    """By the kernel, on this host, for lack of memory."""


class Strike:
    """One blow against one engine."""

    def __init__(self, blow: Blow, before: Before, engine: EngineClient, reach: Reach, stack: ExitStack) -> None:
        self._blow = blow
        self._before = before
        self._engine = engine
        self._reach = reach
        self._size = engine.size
        self._mailbox: Mailbox | None = None
        if blow.fault is not None and before.status.launcher != "ray":  # whose actors take none from outside
            self._mailbox = stack.enter_context(Mailbox(before.places[blow.rank].pid))
        self.struck_at: float | None = None
        """When its last kill was, of the monotonic clock; None if it has not come yet, or a rank does it itself."""
        self._second: asyncio.Task[None] | None = None
        self._order: asyncio.Task[None] | None = None

    @property
    def has_happened(self) -> bool:
        return self.struck_at is not None or (self._mailbox is not None and bool(self._mailbox.injected()))

    @property
    def refusal(self) -> str | None:
        """Why it cannot happen, if the rank has said so."""
        return self._mailbox.refusal() if self._mailbox is not None else None

    async def begin(self) -> None:
        """Do it, or have the rank do it to itself when its moment comes."""
        blow, before = self._blow, self._before
        if self._mailbox is not None and blow.fault is not None:
            self._mailbox.send(blow.fault)
            return
        rank = before.places[blow.rank]
        strikes: dict[BlowKind, Callable[[], Awaitable[None]]] = {
            "kill": partial(self._kill, rank),
            "stop": self._stop,
            "kill-standby": self._kill_standby,
            "kill-both": self._kill_both,
            "kill-lines": self._kill_parent,
            "kill-switch": self._kill_and_again,
            "kill-reload": partial(self._kill_during, self._reload, RELOAD_S),
            "kill-resize": partial(self._kill_during, self._resize, RESIZE_S),
            "kill-watcher": self._kill_watcher,
            "kill-owner": self._kill_owner,
            "kill-engine": self._kill_engine,
        }
        await strikes[blow.kind]()

    async def end(self) -> list[str]:
        """Wait for what it has set off, and bring the size back; what is not right in that, in words."""
        if self._second is not None:
            await self._second
        if self._order is None:
            return []
        try:
            async with asyncio.timeout(ORDER_S):
                await self._end_order(self._order)
        except TimeoutError:
            return [f"the order of {self._blow.kind} has not ended after {ORDER_S:.0f} s"]
        return []

    # ------------------------------------------------------------------------------------- kills

    async def _kill(self, place: Place) -> None:
        await asyncio.to_thread(self._reach.kill, place)
        self.struck_at = time.monotonic()

    async def _stop(self) -> None:
        os.kill(self._before.places[self._blow.rank].pid, signal.SIGSTOP)
        self.struck_at = time.monotonic()

    async def _kill_standby(self) -> None:
        others = self._others(self._ranks()())
        await self._kill(others[self._blow.rank % len(others)])

    async def _kill_both(self) -> None:
        others = self._others(self._ranks()())
        await self._kill(self._before.places[self._blow.rank])
        with suppress(ProcessLookupError):  # the line that it is in has been ended
            await self._kill(others[self._blow.collective % len(others)])

    async def _kill_parent(self) -> None:
        parent = parent_of(self._before.places[0].pid)
        if parent is None:
            raise ProcessLookupError("rank 0 is gone")
        os.kill(parent, signal.SIGKILL)
        self.struck_at = time.monotonic()

    async def _kill_and_again(self) -> None:
        ranks = self._ranks()
        there = ranks()
        known = set(there) if not self._others(there) else {*self._before.places.values()}
        await self._kill(self._before.places[self._blow.rank])
        self._second = asyncio.create_task(self._kill_next(ranks, known))

    async def _kill_next(self, ranks: Callable[[], Sequence[Place]], known: set[Place]) -> None:
        """One of those that take over, at any moment of that: those that stand ready if there are any, or that come."""
        expires_at = time.monotonic() + NEXT_S
        while time.monotonic() < expires_at:
            if found := sorted({*await asyncio.to_thread(ranks)} - known):
                await asyncio.sleep(SWITCH_S * self._blow.collective / 1000)
                with suppress(ProcessLookupError):
                    await self._kill(found[self._blow.rank % len(found)])
                return
            await asyncio.sleep(LOOK_S / 10)

    async def _kill_during(self, order: Callable[[], Coroutine[Any, Any, None]], within_s: float) -> None:
        """Any rank, of those that come as well, at any moment of it."""
        ranks = self._ranks()
        self._order = asyncio.create_task(order())
        await asyncio.sleep(within_s * self._blow.collective / 1000)
        found = self._before.places[self._blow.rank]
        if self._blow.kind == "kill-resize" and self._blow.step % 2:
            others = sorted({*await asyncio.to_thread(ranks)} - {*self._before.places.values()})
            found = others[self._blow.rank % len(others)] if others else found
        try:
            await self._kill(found)
        except ProcessLookupError:  # the resize is done: one of those that serve now
            left = sorted(await asyncio.to_thread(ranks))
            await self._kill(left[self._blow.rank % len(left)])

    async def _kill_watcher(self) -> None:
        """Of all lines."""
        watchers = [pid for pid in children_of(self._before.status.pid) if _WATCHER in command_of(pid)]
        for watcher in watchers:
            os.kill(watcher, signal.SIGKILL)
        self.struck_at = time.monotonic() if watchers else None

    async def _kill_owner(self) -> None:
        agents = sorted(await asyncio.to_thread(self._reach.agents))
        await self._kill(agents[self._blow.rank % len(agents)])

    async def _kill_engine(self) -> None:
        os.kill(self._before.status.pid, signal.SIGKILL)
        self.struck_at = time.monotonic()

    def _ranks(self) -> Callable[[], Sequence[Place]]:
        return self._reach.ranks_beside(self._before.places[0])

    def _others(self, there: Sequence[Place]) -> list[Place]:
        """Ranks that do not compute: they stand ready, or begin."""
        return sorted({*there} - {*self._before.places.values()})

    # ------------------------------------------------------------------------------------- orders

    async def _reload(self) -> None:
        """Of the same weights: streams are to be what they were."""
        await self._engine.maintain(Reload(model=None, when="now", timeout_s=ORDER_S))

    async def _resize(self) -> None:
        """To fewer ranks."""
        await self._to(smaller(self._size))

    async def _to(self, size: Size) -> None:
        await self._engine.resize(size.data_parallel_size, tensor_parallel_size=size.tensor_parallel_size)

    async def _end_order(self, order: asyncio.Task[None]) -> None:
        with suppress(MaintenanceError, NotNowError, ResizeError, ResizeRefusedError, EngineDeadError):
            await order  # or it was undone, and says so
        while self._engine.size != self._size and self._engine.dead is None:
            with suppress(ResizeError, ResizeRefusedError):
                await self._to(self._size)
            await asyncio.sleep(AGAIN_S)


def why_no_way_back(config: Config) -> str | None:
    """What this host lacks for an engine to grow to its size again: a start, unlike growing, may take more ranks than
    there are cores, or a GPU for itself. None if nothing."""
    parallel = config.parallel
    try:
        check_devices(config, smaller(Size(parallel.data_parallel_size, parallel.tensor_parallel_size)))
    except ConfigError as error:
        return str(error)
    return None


def smaller(size: Size) -> Size:
    """Half the ranks of each replica, or half the replicas."""
    if size.tensor_parallel_size > 1:
        return size._replace(tensor_parallel_size=size.tensor_parallel_size // 2)
    return size._replace(data_parallel_size=size.data_parallel_size // 2)
