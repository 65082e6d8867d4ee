"""The engine as the server has it: a process of its own, and another one when it has ended before its time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from phalanx.config import Config
from phalanx.engine.admission import check_request, typed
from phalanx.engine.asked_resize import AskedResize
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.condition import Condition
from phalanx.engine.engine import DRAIN_TIMEOUT_S, ReplicaState
from phalanx.engine.generation_config import GenerationConfig
from phalanx.engine.history import History, with_replicas, without_engine
from phalanx.engine.incarnation import NAME, End, Incarnation, OnProgress, ResizeNews
from phalanx.engine.restarts import WINDOW_S, Restarts
from phalanx.engine.roster import Phase
from phalanx.engine.stream import Origin, OutputDelta, RequestStream
from phalanx.engine.tokenizer import Tokenizer
from phalanx.engine.work import Work
from phalanx.errors import (
    EngineDeadError,
    MaintenanceError,
    NotNowError,
    PhalanxError,
    RequestError,
    ResizeError,
    ResizeRefusedError,
    ResizeUnderWayError,
    UserError,
)
from phalanx.ledger.status import InstanceStatus
from phalanx.membership.resize import Size
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.protocol import (
    FIRST_EPOCH,
    FIRST_WEIGHTS_VERSION,
    Cancel,
    CancelResize,
    EngineStats,
    Maintained,
    MaintenanceOrder,
    Resize,
    ResizeBegun,
    ResizeEnded,
    SamplingParams,
    Sleep,
    StartProgress,
    TokenBatch,
)

log = logging.getLogger("phalanx.engine")

_reading = threading.Lock()
"""transformers imports its parts when they are asked for, and loses names when several threads ask at once."""

StartAgain = Callable[[Config, OnProgress], Awaitable[Incarnation]]


class EngineClient:
    """Starts the engine's process, submits requests to it, and hands their output out.

    For one event loop, in a thread that lives as long as the engine: the kernel kills the engine with that thread. An
    engine that ends (it was killed, hung, or failed) is started again as often as `engine_restarts` says, and gets the
    requests that run, each with what it has made so far: their output only pauses. After that the client is `dead`.
    """

    def __init__(self, config: Config, incarnation: Incarnation, front: Front, start_again: StartAgain) -> None:
        """Use `start`."""
        self.info = incarnation.info
        self.front = front
        self.tokenizer = front.tokenizer
        self.default_sampling = front.default_sampling
        """For what a request leaves open: the checkpoint's advice (generation_config.json) over our defaults."""
        self.dead: str | None = None
        """Why no more requests are taken; None while they are."""
        self.down: str | None = None
        """Why the engine is being started again; None when it is not. Requests wait meanwhile."""
        self.weights_version = FIRST_WEIGHTS_VERSION
        """Of what the next tokens are made with."""
        self._next_version = FIRST_WEIGHTS_VERSION
        """Of the weights that it may be getting."""
        self._config = config
        """Of engines that are started from now on."""
        self._sleep_level = 0
        self._maintaining: asyncio.Future[None] | None = None
        self._phase: str | None = None
        self._vocab_size = front.vocab_size
        self._incarnation = incarnation
        self._start_again = start_again
        self._restarts = Restarts(config.executor.engine_restarts)
        self._restarting: asyncio.Task[None] | None = None
        self._history = History()
        self._work = Work()
        self._news: dict[int, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._is_closing = False
        self._request_ids = itertools.count()
        self._resize_numbers = itertools.count()
        self._resize: AskedResize | None = None
        """Under way."""
        incarnation.attend(self._take, self._on_maintained, self._on_end, self._on_resize)

    @classmethod
    async def start(
        cls,
        config: Config,
        on_progress: OnProgress | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        front: Front | None = None,
    ) -> EngineClient:
        """Start the engine's process and wait until it serves.

        `environment` is for the engine, besides this process's own; `front` that of another client of the same model.
        `on_progress` is called in the event loop. Raises
        UserError for the user's mistakes and StartError for the rest, also when nothing is heard for `start_timeout_s`.
        If it raises or is cancelled, no process is left.
        """
        begin = partial(Incarnation.start, command=command, environment=environment)
        beginning = asyncio.create_task(begin(config, on_progress))
        reading = asyncio.create_task(_load_front(config, beginning, front))
        try:
            incarnation, found = await asyncio.gather(beginning, reading)
        except BaseException:
            beginning.cancel()
            reading.cancel()
            (begun, _) = await asyncio.gather(beginning, reading, return_exceptions=True)
            if isinstance(begun, Incarnation):
                await begun.end()
                begun.forget()
            raise
        return cls(config, incarnation, found, begin)

    @property
    def num_running(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._work)

    @property
    def stats(self) -> EngineStats | None:
        """The latest that was heard; None before. Counts are those of all its processes."""
        stats = self._history.stats_with(self._incarnation.stats)
        if stats is None:
            return None
        stats = with_replicas(stats, len(self.replicas()))  # the engine may not have told of the latest ones
        return stats if self.down is None else without_engine(stats, self.num_running)

    @property
    def condition(self) -> Condition:
        """How the engine is, also when its process is stopped or hangs. Takes microseconds."""
        now = self._incarnation.condition
        return msgspec.structs.replace(
            now,
            dead=self.dead,
            down=self.down,
            phase=self._phase,
            num_restarts=self._history.num_restarts,
            verdicts=self._history.verdicts_with(now.verdicts),
            weights_version=self.weights_version,
        )

    def conditions(self) -> Sequence[Condition]:
        return (self.condition,)

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, of those on this host. Takes milliseconds; for any thread."""
        return self._incarnation.statuses()

    @property
    def asleep(self) -> int:
        """The level of its sleep, in which requests wait; 0 while it is awake."""
        return self._sleep_level

    async def until_settled(self) -> None:
        """Wait while the engine is being started again, or asleep."""
        await self._settled.wait()

    async def maintain(self, order: MaintenanceOrder, *, weights_version: int | None = None) -> None:
        """Have the engine replace its weights, sleep or wake; returns when that is done.

        New weights get this version, by default the next one. Once begun it goes on, also if this is cancelled. Raises
        NotNowError for what is in the way, another UserError for what is wrong in the order, MaintenanceError if it has
        failed: then all is as it was before. EngineDeadError if the engine is dead.
        """
        self._check_lives()
        if self.down is not None:
            raise NotNowError(f"the engine is being started again: {self.down}")
        if self._resize is not None:
            raise NotNowError("a resize is under way")
        if self._maintaining is not None:
            raise NotNowError("another reload, sleep or wake is under way")
        self._next_version = weights_version or self.weights_version + 1
        self._maintaining = asyncio.get_running_loop().create_future()
        self._incarnation.send(order)
        await asyncio.shield(self._maintaining)

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """Output of one request, until the delta with a `finish_reason`. It is submitted when iteration begins.

        Deltas that were not read merge. Closing the iterator early, or cancelling the task that reads it, cancels the
        request. Raises RequestError at once; EngineDeadError at once or from the iterator, as soon as it is dead.
        """
        return self.generate_checked(prompt_token_ids, self.check(prompt_token_ids, sampling))

    def check(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """The sampling parameters with the types that their fields state. Raises what `generate` raises at once."""
        sampling = typed(sampling)
        check_request(prompt_token_ids, sampling, max_model_len=self.info.max_model_len, vocab_size=self._vocab_size)
        self._check_lives()
        return sampling

    def _check_lives(self) -> None:
        if self.dead is not None or self._is_closing:
            raise EngineDeadError(self.dead or f"{NAME} is shutting down")

    def generate_checked(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[OutputDelta, None]:
        """As `generate`, of what this engine or one of the same model has checked."""
        return self.follow(RequestStream(self.tokenizer, prompt_token_ids, sampling))

    async def follow(self, stream: RequestStream) -> AsyncGenerator[OutputDelta, None]:
        """What is still to come of a request, which another engine of the same model may have begun. As `generate`.

        `release` ends the iteration without a `finish_reason`: then another engine can go on with the stream.
        """
        request_id = next(self._request_ids)
        self._work.add(request_id, stream)
        self._news[request_id] = news = asyncio.Event()
        self._submit_next()
        try:
            while True:
                delta = stream.take()
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return
                elif request_id not in self._work:  # it was released
                    return
                elif self.dead is not None:
                    raise EngineDeadError(self.dead)
                else:
                    await news.wait()
                news.clear()
        finally:
            del self._news[request_id]
            self._cancel(self._work.drop(request_id))
            self._note_idle()

    def release(self, stream: RequestStream | None = None) -> None:
        """Let go of a request, or of all, for other engines to `follow`: in its stream is what it has made so far."""
        released, to_cancel = self._work.release(stream)
        self._wake(released)
        self._cancel(to_cancel)
        self._note_idle()

    @property
    def size(self) -> Size:
        """Of the ranks that serve."""
        return Size(self.info.num_replicas, self.info.tensor_parallel_size)

    def replicas(self) -> Sequence[ReplicaState]:
        """They work in lockstep: all serve, or none. Those that join in a resize do so together."""
        state: Phase = "serving" if self.dead is None else "dead"
        there = [
            ReplicaState(replica=replica, state=state, num_requests=self.num_running)
            for replica in range(self.info.num_replicas)
        ]
        if self._resize is None:
            return there
        joining = ReplicaState(replica=0, state="joining", num_requests=0)
        if (told := self._resize.progress) is not None:
            joining = msgspec.structs.replace(joining, phase=told.phase, done=told.done, total=told.total)
        new = range(len(there), self._resize.asked.data_parallel_size)
        return [*there, *(msgspec.structs.replace(joining, replica=replica) for replica in new)]

    @property
    def model(self) -> str:
        """What it would be started with now."""
        return self._config.model.model

    async def begin_resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> asyncio.Task[None]:
        """As Engine.begin_resize. All ranks are replaced at once, so none can be named, and none has to be drained."""
        if leaving:
            raise RequestError("leaving", list(leaving), "none: replicas in lockstep are replaced all at once")
        if self._resize is not None:
            raise ResizeUnderWayError(str(self._resize.before), str(self._resize.asked))
        if self.dead is not None or self._is_closing:
            raise EngineDeadError(self.dead or f"{NAME} is shutting down")
        if self.down is not None:
            raise ResizeRefusedError(f"{NAME} is being started again: resize when it serves")
        if self._sleep_level or self._maintaining is not None:
            raise ResizeRefusedError(f"{NAME} is asleep, or is just getting other weights: resize when it serves")
        now = self.size
        asked = now.changed(data_parallel_size, tensor_parallel_size)
        resize = AskedResize(next(self._resize_numbers), now, asked)
        if asked == now:
            resize.end(ResizeEnded(resize.number, "done"))
        else:
            self._resize = resize
            self._incarnation.send(Resize(resize.number, *asked))
        try:
            await resize.until_begun()
            seeing_through = asyncio.create_task(self._see_through(resize))
            await asyncio.sleep(0)  # a task that is cancelled before it has begun does nothing at all
        except asyncio.CancelledError:
            self._undo(resize)
            raise
        return seeing_through

    async def resize(
        self,
        data_parallel_size: int | None = None,
        *,
        tensor_parallel_size: int | None = None,
        leaving: Sequence[int] = (),
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        """As Engine.resize."""
        resizing = await self.begin_resize(
            data_parallel_size, tensor_parallel_size=tensor_parallel_size, leaving=leaving
        )
        await resizing

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for running requests, cancel the rest, and end the engine's process.

        By force if it does not end by itself: takes seconds beyond `grace_s` at most. May be called more than once.
        """
        self._is_closing = True
        try:
            if self.dead is None:
                await self._end_running(grace_s)
        finally:
            try:
                if self._restarting is not None:
                    self._restarting.cancel()
                    await asyncio.wait([self._restarting])
            finally:
                try:
                    await self._incarnation.end()
                finally:  # also when the kernel cannot end it: nobody may go on waiting for it
                    self._die(f"{NAME} was shut down")
                    self._incarnation.forget()

    async def _see_through(self, resize: AskedResize) -> None:
        """Wait for the end of a resize, and undo it if this is cancelled. Raises ResizeError if it was undone."""
        try:
            ended = await resize.until_over()
        except asyncio.CancelledError:
            self._undo(resize)
            ended = await resize.until_undone()
            if ended.ending == "cancelled":
                raise
        if ended.ending != "done":
            raise ResizeError(f"from {resize.before} to {resize.asked}: {ended.reason or 'it was cancelled'}")

    def _undo(self, resize: AskedResize) -> None:
        """Unless it is over: the engine tells what has become of it."""
        if self._resize is resize:
            self._incarnation.send(CancelResize(resize.number))

    def _on_resize(self, news: ResizeNews) -> None:
        """What the engine tells of the resize that is under way."""
        resize = self._resize
        if resize is None:
            return
        if isinstance(news, StartProgress):
            resize.progress = news
        elif isinstance(news, ResizeBegun):
            resize.begin()
        else:
            self._resize = None
            if news.ready is not None:
                self.info = news.ready
                parallel = msgspec.structs.replace(self._config.parallel, **resize.asked._asdict())
                self._config = msgspec.structs.replace(self._config, parallel=parallel)
            resize.end(news)

    def _give_up_resize(self, reason: str) -> None:
        """The engine has ended: one that is started again has the size from before."""
        if self._resize is not None:
            self._on_resize(ResizeEnded(self._resize.number, "failed", reason))

    async def _end_running(self, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.num_running:
                    self._idle.clear()
                    await self._idle.wait()
        cancelled, to_cancel = self._work.cancel_all()
        self._wake(cancelled)
        self._cancel(to_cancel)

    def _submit_next(self) -> None:
        """Give the engine the requests that it may have now, if there is one."""
        if self.down is None and self.dead is None:
            for submit in self._work.take_next():
                self._incarnation.send(submit)

    def _cancel(self, request_ids: Sequence[int]) -> None:
        if request_ids and self.dead is None:
            self._incarnation.send(Cancel(tuple(request_ids)))
        self._submit_next()

    def _take(self, batch: TokenBatch) -> None:
        touched, to_cancel = self._work.take(batch, self._origin)
        self._cancel(to_cancel)
        self._wake(touched)
        self._note_idle()

    @property
    def _origin(self) -> Origin:
        """Of the tokens that come now: the engine tells of new weights and ranks before it sends what they make."""
        stats = self._incarnation.stats
        formation = stats.formation if stats is not None else None
        return Origin(self.weights_version, FIRST_EPOCH if formation is None else formation.epoch)

    def _on_maintained(self, outcome: Maintained) -> None:
        if outcome.has_new_weights:
            self.weights_version = self._next_version
        if outcome.model is not None:
            self._config = self._config.with_model(outcome.model)
        stats = self._incarnation.stats
        self._sleep_level = stats.maintenance.level if stats is not None and stats.maintenance is not None else 0
        self._note_settled()
        self._end_maintaining(_error_of(outcome))

    def _end_maintaining(self, error: PhalanxError | None) -> None:
        """Tell who waits for it, if somebody does: an engine that was started again is put to sleep by itself."""
        maintaining, self._maintaining = self._maintaining, None
        if maintaining is None:
            return
        if error is None:
            maintaining.set_result(None)
        else:
            maintaining.set_exception(error)
            maintaining.exception()  # who asked for it may have gone

    def _note_settled(self) -> None:
        if self.dead is not None or (self.down is None and not self._sleep_level):
            self._settled.set()
        else:
            self._settled.clear()

    def _on_end(self, end: End) -> None:
        """The engine has ended: this is the end of all, or the time until there is another one begins."""
        self._end_maintaining(
            MaintenanceError(f"the engine has ended, and begins with the weights of before: {end.reason}")
        )
        self._give_up_resize(end.reason)
        if self._is_closing or end.is_user_error:
            self._die(end.reason)
            return
        self._wake(self._work.engine_ended(end.reason, is_from_outside=end.is_from_outside))
        delay_s = self._restarts.next_delay_s(time.monotonic())
        if delay_s is None:
            self._die(end.reason + self._told_restarts())
            return
        self.down = end.reason
        self._note_settled()
        self._restarting = asyncio.create_task(self._restart(delay_s))

    async def _restart(self, delay_s: float) -> None:
        """Until there is an engine again, or no more restarts are left."""
        began_at = time.monotonic()
        try:
            while True:
                log.error(
                    "%s; it is started again (%d of %d within %g s), requests that wait for it: %d",
                    self.down,
                    self._restarts.num_recent,
                    self._restarts.most,
                    WINDOW_S,
                    self.num_running,
                )
                await self._incarnation.end()
                await self._incarnation.until_ranks_are_gone()
                await asyncio.sleep(delay_s)
                try:
                    incarnation = await self._start_again(self._config, self._note_phase)
                    break
                except (PhalanxError, OSError) as error:
                    self.down = str(error)
                    next_delay_s = self._restarts.next_delay_s(time.monotonic())
                    if next_delay_s is None:
                        self._die(self.down + self._told_restarts())
                        return
                    delay_s = next_delay_s
        except Exception as error:
            self._die(f"{NAME} cannot be started again: {error!r}")
            raise
        taken_s = time.monotonic() - began_at
        log.warning("%s serves again after %.1f s, requests that go on: %d", NAME, taken_s, self.num_running)
        self._succeed(incarnation)

    def _succeed(self, incarnation: Incarnation) -> None:
        before, self._incarnation = self._incarnation, incarnation
        self._history.add(before.stats, before.condition.verdicts)
        before.forget()
        self.info = incarnation.info
        self.down = self._phase = None
        self._note_settled()
        incarnation.attend(self._take, self._on_maintained, self._on_end, self._on_resize)
        if self._sleep_level:
            incarnation.send(Sleep(2 if self._sleep_level == 2 else 1))
        self._submit_next()

    def _note_phase(self, progress: StartProgress) -> None:
        self._phase = progress.phase

    def _told_restarts(self) -> str:
        num = self._restarts.num_recent
        return f" (it was started again {num} times within {WINDOW_S:.0f} s)" if num else ""

    def _die(self, reason: str) -> None:
        if self.dead is None:
            self.dead = reason
            self.down = None
            self._note_settled()
            self._give_up_resize(reason)
            self._wake(list(self._news))

    def _wake(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._news[request_id].set()

    def _note_idle(self) -> None:
        if not self.num_running:
            self._idle.set()


def _error_of(outcome: Maintained) -> PhalanxError | None:
    if outcome.error is None:
        return None
    if outcome.is_not_now:
        return NotNowError(outcome.error)
    return UserError(outcome.error) if outcome.is_user_error else MaintenanceError(outcome.error)


class Front(NamedTuple):
    """What the client itself needs of the checkpoint; loaded while the engine starts."""

    tokenizer: Tokenizer
    default_sampling: SamplingParams
    vocab_size: int
    """Of tokens that both the tokenizer and the model have: either may have some that the other lacks."""


async def _load_front(config: Config, beginning: asyncio.Task[Incarnation], known: Front | None) -> Front:
    if known is not None:
        return known
    if not Path(config.model.model).expanduser().is_dir():
        await beginning  # by then the engine has fetched and converted the checkpoint
    return await asyncio.to_thread(_read_front, config)


def _read_front(config: Config) -> Front:
    with _reading:
        return _read_front_alone(config)


def _read_front_alone(config: Config) -> Front:
    name, directory = config.model.model, Path(config.model.model).expanduser()
    is_local = directory.is_dir()
    checkpoint = Checkpoint(directory, name) if is_local else resolve(name, revision=config.model.revision)
    tokenizer = Tokenizer.load(config.model.tokenizer or checkpoint.path)
    default_sampling = GenerationConfig.read(checkpoint.path).default_sampling()
    return Front(tokenizer, default_sampling, min(tokenizer.vocab_size, checkpoint.vocab_size))
