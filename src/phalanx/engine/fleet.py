"""Independent replicas: an engine each, in processes of its own, and one front for all of them, of any number."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.config import Config
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.client import EngineClient
from phalanx.engine.condition import Condition
from phalanx.engine.engine import DRAIN_TIMEOUT_S, Engine, ReplicaState
from phalanx.engine.incarnation import OnProgress
from phalanx.engine.roster import Empty, End, Keep, Order, Phase, Replace, Resize, Roster, Start
from phalanx.engine.router import Router
from phalanx.engine.seats import Seats, settings_of_replicas
from phalanx.engine.stream import OutputDelta, RequestStream
from phalanx.errors import (
    ConfigError,
    EngineDeadError,
    NotNowError,
    PhalanxError,
    RequestError,
    ResizeError,
    ResizeRefusedError,
    ResizeUnderWayError,
)
from phalanx.ledger.status import InstanceStatus
from phalanx.protocol import (
    EngineStats,
    MaintenanceOrder,
    Reload,
    ReplicaStats,
    SamplingParams,
    Sleep,
    StartProgress,
)

WATCH_POLL_S = 0.02
EMPTY_POLL_S = 0.02
REPLACE_AFTER_S = 30.0
"""An engine that could not be started again waits so long for another one, and twice as long each time it fails."""
REPLACE_AFTER_AT_MOST_S = 600.0
PIECE_S = 0.2
PIECE_TOKENS = (16, 2048)
"""A request that moves is computed ahead in pieces of so many tokens, as large as take PIECE_S: what runs beside it
waits as long for its next token.
"""
MOVE_TIMEOUT_S = 60.0
"""For all requests of a replica that leaves: the others may be too busy to keep up with what it makes, or hang."""
MAX_DEATHS = 3
"""A request that so many replicas have died with may be why they did, and is given to no other."""

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
        self._first = first.info
        self._front = first.front
        self.tokenizer = first.tokenizer
        self.default_sampling = first.default_sampling
        self._command = command
        self._config = config
        self._seats = Seats(config)
        self._engines = dict(enumerate(engines))
        self._roster = Roster(len(engines), replaces_dead=True)
        self._router = Router(first.info.block_size)
        self._requests: set[_Request] = set()
        """Those that run."""
        self._told: dict[int, StartProgress] = {}
        """What each that starts has said last."""
        self._work: dict[int, asyncio.Task[None]] = {}
        """What is being done about replicas, by their numbers: one thing at a time."""
        self._piece = PIECE_TOKENS[0]
        """Tokens that are computed ahead at a time."""
        self._placing = asyncio.Lock()
        """On a Ray cluster one starts after the other has its place."""
        self._drain_timeout_s = DRAIN_TIMEOUT_S
        self._weights_version = first.weights_version
        """Of replicas that join from now on."""
        self._maintaining: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._is_closing = False
        self._is_reshaping = False
        """Whether the one replica is getting ranks of another TP size."""
        self._deaths = asyncio.create_task(self._watch())
        self._note_change()

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
            return cls(config, await asyncio.gather(*starting), command)
        except BaseException:
            for task in starting:
                task.cancel()
            ended = await asyncio.gather(*starting, return_exceptions=True)
            await asyncio.gather(*(engine.close() for engine in ended if isinstance(engine, EngineClient)))
            raise

    @property
    def stats(self) -> EngineStats | None:
        found = {number: engine.stats for number, engine in self._engines.items() if engine.stats is not None}
        if not found:
            return None
        nothing = ReplicaStats(0, 0, 0, self.info.num_blocks, 0, 0, 0, 0, 0)
        replicas = [found[number].replicas[0] if number in found else nothing for number in self._roster.phases]
        return EngineStats(tuple(replicas))

    @property
    def dead(self) -> str | None:
        reasons = [engine.dead for engine in self._active().values()]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)

    @property
    def down(self) -> str | None:
        living = [engine for engine in self._engines.values() if engine.dead is None]
        reasons = [engine.down for engine in living if engine.down is not None]
        return "; ".join(reasons) if living and len(reasons) == len(living) else None

    def conditions(self) -> Sequence[Condition]:
        return [msgspec.structs.replace(engine.condition, replica=number) for number, engine in self._active().items()]

    def statuses(self) -> Sequence[InstanceStatus]:
        return [status for engine in list(self._engines.values()) for status in engine.statuses()]

    def replicas(self) -> Sequence[ReplicaState]:
        return [self._state_of(number, phase) for number, phase in self._roster.phases.items()]

    def _state_of(self, number: int, phase: Phase) -> ReplicaState:
        engine, told = self._engines.get(number), self._told.get(number)
        state = ReplicaState(replica=number, state=phase, num_requests=engine.num_running if engine is not None else 0)
        if told is None:
            return state
        return msgspec.structs.replace(state, phase=told.phase, done=told.done, total=told.total)

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines.values())

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """As EngineClient.generate, by the replica that suits the request best when iteration begins."""
        checked = self._engines[self._living()[0]].check(prompt_token_ids, sampling)
        return self._deltas(RequestStream(self.tokenizer, prompt_token_ids, checked))

    async def until_settled(self) -> None:
        """As EngineClient.until_settled, of any that is not dead."""
        while self.down is not None or self.asleep:
            living = [engine for engine in self._engines.values() if engine.dead is None]
            waits = [asyncio.create_task(engine.until_settled()) for engine in living]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    @property
    def asleep(self) -> int:
        """As EngineClient.asleep, of all that live."""
        return min((engine.asleep for engine in self._engines.values() if engine.dead is None), default=0)

    async def maintain(self, order: MaintenanceOrder) -> None:
        """As EngineClient.maintain. All sleep and wake at the same time; weights are replaced in one after the other.

        If that fails in one of them, those before it have the new weights: `conditions` tells, and asking again brings
        them into all.
        """
        self._living()
        if self._roster.resize is not None:
            raise NotNowError("a resize is under way")
        if self._maintaining is not None and not self._maintaining.done():
            raise NotNowError("another reload, sleep or wake is under way")
        if down := self._numbers_down():
            raise NotNowError(f"replicas are being started again: {', '.join(map(str, down))}")
        engines = {number: engine for number, engine in self._active().items() if engine.dead is None}
        work = self._reload(order, engines) if isinstance(order, Reload) else self._all_maintain(order, engines)
        self._maintaining = asyncio.create_task(work)
        await asyncio.shield(self._maintaining)

    async def _reload(self, order: Reload, engines: Mapping[int, EngineClient]) -> None:
        version = 1 + max(engine.weights_version for engine in engines.values())
        for number, engine in engines.items():
            log.info("replica %d gets weights of version %d", number, version)
            await engine.maintain(order, weights_version=version)
            self._router.forget(number)  # its cache is empty
        self._note_weights(version, engine.model)

    async def _all_maintain(self, order: MaintenanceOrder, engines: Mapping[int, EngineClient]) -> None:
        """Raises what the first one raises that fails, when all are done."""
        version = 1 + max(engine.weights_version for engine in engines.values())
        work = [engine.maintain(order, weights_version=version) for engine in engines.values()]
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        for number in engines:
            self._router.forget(number)
        if errors := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
            raise errors[0]
        first = next(iter(engines.values()))
        self._note_weights(first.weights_version, first.model)

    def _note_weights(self, version: int, model: str) -> None:
        """What replicas have that join from now on."""
        self._weights_version = version
        if model != self._config.model.model:
            self._config = self._config.with_model(model)
            self._seats.use_model(model)

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
        now = self._config.parallel.tensor_parallel_size
        self._check_shape()
        if self.asleep or (self._maintaining is not None and not self._maintaining.done()):
            raise ResizeRefusedError("the engine is asleep, or is just getting other weights: resize when it serves")
        self._roster.check(size, leaving, self._numbers_down())
        if tensor_parallel_size not in (None, now):
            return await self._begin_to_reshape(size, tensor_parallel_size)
        return await self._begin_to_resize(size, leaving, drain_timeout_s)

    async def _begin_to_reshape(self, size: int, tensor_parallel_size: int | None) -> asyncio.Task[None]:
        """Have other ranks take over what the one replica does. Raises ConfigError if there are several."""
        if size > 1 or self._roster.size > 1:
            allowed = f"only one replica can change it, and there are {max(size, self._roster.size)}: change that first"
            raise ConfigError("tensor_parallel_size", tensor_parallel_size, allowed)
        engine = self._engines[self._living()[0]]
        self._is_reshaping = True
        try:
            reshaping = await engine.begin_resize(tensor_parallel_size=tensor_parallel_size)
        except BaseException:
            self._is_reshaping = False
            raise
        return await _begun(self._see_reshaped(engine, reshaping))

    async def _see_reshaped(self, engine: EngineClient, reshaping: asyncio.Task[None]) -> None:
        """Wait for the end of it: replicas to come are like this one."""
        try:
            await reshaping
        finally:
            self._is_reshaping = False
            size = engine.size.tensor_parallel_size
            parallel = msgspec.structs.replace(self._config.parallel, tensor_parallel_size=size)
            self._config = msgspec.structs.replace(self._config, parallel=parallel)
            self._seats = Seats(self._config)
            self._first = engine.info
            self._note_change()

    def _check_shape(self) -> None:
        """Raises ResizeUnderWayError."""
        if self._is_reshaping:
            size = self._config.parallel.tensor_parallel_size
            raise ResizeUnderWayError(f"tensor_parallel_size {size}", "another one")

    async def _begin_to_resize(
        self, data_parallel_size: int, leaving: Sequence[int], drain_timeout_s: float
    ) -> asyncio.Task[None]:
        pids = [engine.condition.pid for engine in self._engines.values() if engine.dead is None]
        joining = self._roster.free_numbers(max(data_parallel_size - self._roster.size, 0))
        await asyncio.to_thread(self._seats.check_room, data_parallel_size, joining, pids)
        if self._is_closing:
            raise EngineDeadError("the engine is shutting down")
        self._check_shape()
        num_requests = {number: engine.num_running for number, engine in self._engines.items()}
        orders = self._roster.begin(data_parallel_size, leaving, num_requests, self._numbers_down())
        self._drain_timeout_s = drain_timeout_s
        resize = self._roster.resize
        if resize is not None:
            log.info("resizing from %d to %d replicas", resize.size_before, resize.size_asked_for)
        self._carry_out(orders)
        return await _begun(self._see_through(resize))

    async def close(self, grace_s: float = 0.0) -> None:
        """As EngineClient.close, of all at the same time. What the roster orders from now on is left undone."""
        self._is_closing = True
        self._deaths.cancel()
        self._note_change()
        for task in self._work.values():
            task.cancel()
        try:
            await asyncio.gather(*self._work.values(), return_exceptions=True)
        finally:
            await asyncio.gather(*(engine.close(grace_s) for engine in self._engines.values()))

    async def _deltas(self, stream: RequestStream) -> AsyncGenerator[OutputDelta, None]:
        self._living()
        request = _Request(stream)
        self._requests.add(request)
        try:
            while True:
                # Nothing comes between this and the request's beginning there: then it counts as one of that replica.
                request.replica = self._pick(request.stream)
                async with aclosing(self._follow(request)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            return
        finally:
            self._requests.remove(request)

    async def _follow(self, request: _Request) -> AsyncGenerator[OutputDelta, None]:
        """What the replica makes of it, until the request has ended, or moves on."""
        try:
            async with aclosing(self._engines[request.replica].follow(request.stream)) as deltas:
                async for delta in deltas:
                    yield delta
        except EngineDeadError:
            request.num_deaths += 1
            if request.num_deaths == MAX_DEATHS or self._is_closing:
                raise

    def _pick(self, stream: RequestStream) -> int:
        """The replica that suits a request best. Raises EngineDeadError if none is left."""
        living = self._living()
        serving = [number for number in self._roster.serving() if number in living]
        candidates = (
            [number for number in serving if self._engines[number].condition.is_healthy]
            or serving  # one in trouble may come out of it
            or living  # one that leaves, if it comes to that
        )
        return self._router.pick(stream.token_ids, {number: self._engines[number].num_running for number in candidates})

    def _living(self) -> list[int]:
        """At least one. Raises EngineDeadError if none is left."""
        living = [number for number, engine in self._active().items() if engine.dead is None]
        if not living:
            raise EngineDeadError(str(self.dead))
        return living

    def _numbers_down(self) -> list[int]:
        """Those whose engines are being started again."""
        return [number for number, engine in self._engines.items() if engine.down is not None]

    def _active(self) -> dict[int, EngineClient]:
        """Those that have requests, or would have. One that is being ended lives for a while, and takes none."""
        phases = self._roster.phases
        return {number: self._engines[number] for number in phases if phases[number] in ("serving", "leaving", "dead")}

    def _carry_out(self, orders: Sequence[Order]) -> None:
        for order in () if self._is_closing else orders:  # all end, and nobody would wait for these
            number = order.number
            before = self._work.pop(number, None)
            if before is asyncio.current_task():
                before = None
            if before is not None:
                before.cancel()
            self._work[number] = asyncio.create_task(self._do(order, before))
        self._note_change()

    async def _do(self, order: Order, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await _end_of(before)
        number = order.number
        if isinstance(order, Start):
            await self._start(number)
        elif isinstance(order, Empty):
            await self._empty(number)
        elif isinstance(order, Replace):
            await self._replace(number)
        elif isinstance(order, End):
            await self._end(number)
        else:
            assert isinstance(order, Keep), order

    async def _start(self, number: int) -> None:
        try:
            await self._launch(number)
        except Exception as error:  # whatever it is, the others go on, and who waits has to be told
            log.error("replica %d did not start: %s", number, error, exc_info=not isinstance(error, PhalanxError))
            self._carry_out(self._roster.failed(number, str(error) or type(error).__name__))
        else:
            self._carry_out(self._roster.ready(number))

    async def _launch(self, number: int) -> None:
        """Start an engine for a replica. Raises what EngineClient.start does."""
        size = max(self._roster.size, self._roster.resize.size_asked_for if self._roster.resize else 0)
        own, environment = self._seats.settings(number, size, self.info.max_model_len)
        report = _Report(partial(self._told.__setitem__, number), 0)
        start = partial(
            EngineClient.start, own, report, command=self._command, environment=environment, front=self._front
        )
        starting: asyncio.Task[EngineClient] | None = None
        try:
            async with self._placing:
                starting = asyncio.create_task(start())
                if own.executor.launcher == "ray":
                    await report.until_placed(starting)
            engine = await starting
            engine.weights_version = self._weights_version
            if self.asleep:
                await self._put_to_sleep(engine)
            self._engines[number] = engine
        except asyncio.CancelledError:
            if starting is not None:
                await _undo(starting)
            raise
        finally:
            self._told.pop(number, None)

    async def _put_to_sleep(self, engine: EngineClient) -> None:
        """Have one that is new be as the others are."""
        try:
            await engine.maintain(Sleep(2 if self.asleep == 2 else 1))
        except PhalanxError:
            await engine.close()
            raise

    async def _replace(self, number: int) -> None:
        """Start an engine in the place of one that has ended, until it is there."""
        await self._close(number)
        delay_s = REPLACE_AFTER_S
        while True:
            await asyncio.sleep(delay_s)
            try:
                await self._launch(number)
            except Exception as error:
                delay_s = min(2 * delay_s, REPLACE_AFTER_AT_MOST_S)
                log.error("replica %d could not be replaced, next try in %.0f s: %s", number, delay_s, error)
            else:
                self._router.forget(number)
                log.info("replica %d has been replaced", number)
                self._carry_out(self._roster.ready(number))
                return

    async def _empty(self, number: int) -> None:
        """Let a replica's requests end, and give those that take too long to others."""
        engine = self._engines[number]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                while engine.num_running and engine.dead is None and engine.down is None:
                    await asyncio.sleep(EMPTY_POLL_S)
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S):
                for request in [request for request in self._requests if request.replica == number]:
                    await self._move(request, engine)
        except TimeoutError:
            num_left = engine.num_running
            log.warning("replica %d: %d requests move before others have computed them ahead", number, num_left)
        engine.release()
        self._carry_out(self._roster.emptied(number))

    async def _move(self, request: _Request, engine: EngineClient) -> None:
        """Have a request go on in another replica, which computes what there is of it while it still runs in this one.

        So its client waits only for what is new since then, which is not in the other one's prefix cache.
        """
        if self._config.cache.enable_prefix_caching:
            with suppress(EngineDeadError, RequestError):  # then it has to wait for that
                await self._compute_ahead(request, engine)
        engine.release(request.stream)

    async def _compute_ahead(self, request: _Request, engine: EngineClient) -> None:
        num_done, is_whole = 0, False
        while not is_whole:
            token_ids = request.stream.token_ids
            if engine.dead is not None or engine.down is not None or request not in self._requests:
                return  # it waits already, or does so no more
            began_at, before = time.monotonic(), num_done
            num_done = min(before + self._piece, token_ids.size)
            is_whole = num_done == token_ids.size  # but for what is made meanwhile
            async with aclosing(self._deltas(self._rehearsal(token_ids[:num_done]))) as ahead:
                async for _ in ahead:
                    pass
            took_s = time.monotonic() - began_at
            if not is_whole or took_s > PIECE_S:  # a rest tells only that a piece is too large
                self._piece = piece_that_takes(PIECE_S, num_done - before, took_s)

    async def _end(self, number: int) -> None:
        if number in self._engines:
            await self._close(number)
            del self._engines[number]
        self._router.forget(number)
        self._carry_out(self._roster.ended(number))

    def _rehearsal(self, token_ids: NDArray[np.int32]) -> RequestStream:
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        return RequestStream(self.tokenizer, token_ids.tolist(), sampling, is_rehearsal=True)

    async def _close(self, number: int) -> None:
        """End an engine. What the kernel cannot end is said: nothing can be done about it, and others wait."""
        try:
            await self._engines[number].close()
        except Exception:
            log.exception("replica %d did not end", number)

    async def _see_through(self, resize: Resize | None) -> None:
        """Wait for the end of a resize, and undo it if this is cancelled. Raises ResizeError if it was undone."""
        if resize is None:  # there are as many as asked for
            return
        try:
            await self._until_over(resize)
        except asyncio.CancelledError:
            self._carry_out(self._roster.cancel("it was cancelled"))
            await self._until_over(resize)
            if resize.outcome is not None and resize.outcome.ending == "cancelled":
                raise
        assert resize.outcome is not None
        if resize.outcome.ending != "done":
            raise ResizeError(str(resize.outcome.reason))

    async def _until_over(self, resize: Resize) -> None:
        while self._roster.resize is resize:
            if self._is_closing:
                raise EngineDeadError("the engine is shutting down")
            await self._changed.wait()

    def _note_change(self) -> None:
        """Something about the replicas has changed."""
        size, one = self._roster.size, self._first.world_size
        self.info = msgspec.structs.replace(self._first, world_size=size * one, num_replicas=size)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self) -> None:
        """See that requests of a replica that has ended go on in others, and that another engine takes its place."""
        while True:
            for number, engine in list(self._engines.items()):
                if engine.down is not None:
                    self._router.forget(number)  # what it had in its cache is lost
                    self._move_from(number, engine)
                if engine.dead is not None and self._roster.counts_on(number):
                    self._note_death(number, engine.dead)
            await asyncio.sleep(WATCH_POLL_S)

    def _move_from(self, number: int, engine: EngineClient) -> None:
        """Let others have the requests of one that is being started again, as long as there are any that serve.

        But each only once: one that has seen two engines end may be why they did. Then it stays where it is, where that
        is found out (engine/trials.py).
        """
        others = [other for other in self._roster.serving() if other != number]
        if not any(self._engines[other].condition.is_healthy for other in others):
            return
        for request in self._requests:
            if request.replica == number and not request.num_deaths:
                request.num_deaths += 1
                engine.release(request.stream)

    def _note_death(self, number: int, reason: str) -> None:
        num_alive = sum(engine.dead is None for engine in self._engines.values())
        log.error("replica %d has ended, %d of %d go on: %s", number, num_alive, len(self._engines), reason)
        self._carry_out(self._roster.died(number, reason))


def piece_that_takes(wanted_s: float, piece: int, took_s: float) -> int:
    """Tokens to compute at a time, when `piece` of them took `took_s`: at most twice as many, within PIECE_TOKENS."""
    least, most = PIECE_TOKENS
    return min(max(int(piece * min(wanted_s / max(took_s, 1e-6), 2.0)), least), most)


class _Request:
    """A request, and where it is."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.replica = -1
        """The one that has it; none yet."""
        self.num_deaths = 0
        """Of replicas that had it."""


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


async def _begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that has begun: one that is cancelled before does nothing at all."""
    task = asyncio.create_task(work)
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task


async def _undo(starting: asyncio.Task[EngineClient]) -> None:
    """Have an engine not start, or end if it has started by now."""
    starting.cancel()
    await _end_of(starting)
    if not starting.cancelled() and starting.exception() is None:
        await starting.result().close()


async def _end_of(task: asyncio.Task[Any]) -> None:
    """Wait for the end of a task that was cancelled, also if this one is cancelled as well."""
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
