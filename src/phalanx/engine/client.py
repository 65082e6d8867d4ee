"""The engine as the server has it: a process of its own, reached over one stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from phalanx.config import Config
from phalanx.engine.admission import check_request, typed
from phalanx.engine.child import ENGINE_COMMAND, EngineChild
from phalanx.engine.condition import Condition, ProcessWatch
from phalanx.engine.engine import DRAIN_TIMEOUT_S, ReplicaState
from phalanx.engine.generation_config import GenerationConfig
from phalanx.engine.roster import Phase
from phalanx.engine.stream import OutputDelta, RequestStream, Streams
from phalanx.engine.tokenizer import Tokenizer
from phalanx.errors import ConfigError, EngineDeadError, FrameError, PeerDiedError, PhalanxError, StartError, UserError
from phalanx.ledger.attach import SILENT_WATCHER_S, Attached, silent_s
from phalanx.ledger.board import Notice
from phalanx.ledger.instance import shown_by
from phalanx.ledger.report import VerdictReport
from phalanx.ledger.status import InstanceStatus
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.protocol import (
    Cancel,
    ClientMessage,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineStats,
    FinishReason,
    SamplingParams,
    Shutdown,
    StartProgress,
    TokenBatch,
)
from phalanx.transport.liveness import Party
from phalanx.transport.stream import AsyncStream

OnProgress = Callable[[StartProgress], None]

NAME = "the engine"
START_GRACE_S = 10.0
"""Beyond the start's own deadline: that the engine reports it says more than its silence."""
SHUTDOWN_TIMEOUT_S = 10.0
LAST_WORDS_S = 1.0
"""Between the end of the engine's stream and the end of its process."""
LISTEN_S = 0.25
SILENCE_GRACE_S = 15.0
"""Beyond the time for a step, in which the engine is silent in good order. It is more than any other wait of its loop
takes (HEARTBEAT_DEADLINE_S of process.py is the longest): that it tells which rank it waits for says more than silence.
"""

_reading = threading.Lock()
"""transformers imports its parts when they are asked for, and loses names when several threads ask at once."""

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], EngineMessage] = msgspec.msgpack.Decoder(EngineMessage).decode


class EngineClient:
    """Starts the engine's process, submits requests to it, and hands their output out.

    For one event loop, in a thread that lives as long as the engine: the kernel kills the engine with that thread. An
    engine that is silent for longer than a step may take, and SILENCE_GRACE_S, is killed: then it is `dead`.
    """

    def __init__(
        self,
        child: EngineChild,
        stream: AsyncStream,
        info: EngineReady,
        front: _Front,
        silence_timeout_s: float,
    ) -> None:
        """Use `start`."""
        self.info = info
        self.tokenizer = front.tokenizer
        self.default_sampling = front.default_sampling
        """For what a request leaves open: the checkpoint's advice (generation_config.json) over our defaults."""
        self.stats: EngineStats | None = None
        self.dead: str | None = None
        """Why the engine takes no more requests; None while it does."""
        self._vocab_size = front.vocab_size
        self._child = child
        self._stream = stream
        self._streams = Streams()
        self._news: dict[int, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._is_closing = False
        self._silence_timeout_s = silence_timeout_s
        self._silent_s = 0.0
        self._process = ProcessWatch(child.pid, silence_timeout_s - SILENCE_GRACE_S)
        self._attached = _attach(child.pid)
        self._ended_by: VerdictReport | None = None
        self._stepped_at: float | None = None
        self._outbox: asyncio.Queue[ClientMessage] = asyncio.Queue()
        self._request_ids = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: Config,
        on_progress: OnProgress | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
    ) -> EngineClient:
        """Start the engine's process and wait until it serves.

        `environment` is for the engine, besides this process's own. `on_progress` is called in the event loop. Raises
        UserError for the user's mistakes and StartError for the rest, also when nothing is heard for `start_timeout_s`.
        If it raises or is cancelled, no process is left.
        """
        child = EngineChild.spawn(command, environment)
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.callback(child.kill)
            stream = await AsyncStream.open(child.descriptor, Party(NAME, child.pid, start_time=0))
            on_failure.push_async_callback(stream.close)
            try:
                client = await cls._start(config, on_progress, child, stream)
            except PhalanxError:
                await stream.close()  # tells the engine that its last words were heard
                await child.wait(LAST_WORDS_S)  # it is ending its workers
                raise
            on_failure.pop_all()
            return client

    @classmethod
    async def _start(
        cls, config: Config, on_progress: OnProgress | None, child: EngineChild, stream: AsyncStream
    ) -> EngineClient:
        silence_s = config.executor.start_timeout_s + START_GRACE_S
        frames = aiter(stream)
        with contextlib.suppress(PeerDiedError):  # it ended at once: the end of `frames` will tell
            await stream.send(_encode(config))
        ready = asyncio.create_task(_await_ready(frames, child, on_progress, silence_s))
        front = asyncio.create_task(_load_front(config, ready))
        try:
            info, found = await asyncio.gather(ready, front)
        finally:
            ready.cancel()
            front.cancel()
        # A turn of the engine may wait for an exchange of experts, and then for the step after it.
        num_waits = 2 if config.parallel.enable_eplb else 1
        client = cls(child, stream, info, found, num_waits * config.executor.step_timeout_s + SILENCE_GRACE_S)
        work = (client._read(frames), client._write(), client._listen())
        client._tasks = [asyncio.create_task(task) for task in work]
        return client

    @property
    def num_running(self) -> int:
        """Requests that were submitted and have not ended."""
        return len(self._streams)

    @property
    def condition(self) -> Condition:
        """How the engine is, also when its process is stopped or hangs. Takes microseconds."""
        notice = self._attached.notice() if self._attached is not None else Notice()
        silent = silent_s(notice, time.monotonic_ns())
        is_watched = silent is not None and silent < SILENT_WATCHER_S and self.dead is None
        own = self._process.counts
        return Condition(
            pid=self._child.pid,
            dead=self.dead,
            trouble=self._ended_by or self._trouble(),
            since_step_s=None if self._stepped_at is None else time.monotonic() - self._stepped_at,
            num_watched=notice.num_ranks if is_watched else 0,
            verdicts={cause: notice.counts.get(cause, 0) + own.get(cause, 0) for cause in {*notice.counts, *own}},
        )

    def conditions(self) -> Sequence[Condition]:
        return (self.condition,)

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, of those on this host. Takes milliseconds; for any thread."""
        return () if self._attached is None else (self._attached.status(self._trouble()),)

    def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> AsyncGenerator[OutputDelta, None]:
        """Output of one request, until the delta with a `finish_reason`. It is submitted when iteration begins.

        Deltas that were not read merge. Closing the iterator early, or cancelling the task that reads it, cancels the
        request. Raises RequestError at once; EngineDeadError at once or from the iterator, as soon as the engine dies.
        """
        return self.generate_checked(prompt_token_ids, self.check(prompt_token_ids, sampling))

    def check(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> SamplingParams:
        """The sampling parameters with the types that their fields state. Raises what `generate` raises at once."""
        sampling = typed(sampling)
        check_request(prompt_token_ids, sampling, max_model_len=self.info.max_model_len, vocab_size=self._vocab_size)
        if self.dead is not None or self._is_closing:
            raise EngineDeadError(self.dead or f"{NAME} is shutting down")
        return sampling

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
        self._streams.add(request_id, stream)
        self._news[request_id] = news = asyncio.Event()
        self._outbox.put_nowait(stream.submit(request_id))
        try:
            while True:
                delta = stream.take()
                if delta is not None:
                    yield delta
                    if delta.finish_reason is not None:
                        return
                elif request_id not in self._streams:  # it was released
                    return
                elif self.dead is not None:
                    raise EngineDeadError(self.dead)
                else:
                    await news.wait()
                news.clear()
        finally:
            del self._news[request_id]
            if self._streams.drop(request_id) and self.dead is None:
                self._outbox.put_nowait(Cancel((request_id,)))
            self._note_idle()

    def release(self, stream: RequestStream | None = None) -> None:
        """Let go of a request, or of all, for other engines to `follow`: in its stream is what it has made so far."""
        released = self._streams.drop_all() if stream is None else self._streams.drop_stream(stream)
        self._wake(released)
        if released and self.dead is None:
            self._outbox.put_nowait(Cancel(tuple(released)))
        self._note_idle()

    def replicas(self) -> Sequence[ReplicaState]:
        """They work in lockstep: all serve, or none."""
        state: Phase = "serving" if self.dead is None else "dead"
        return [
            ReplicaState(replica=replica, state=state, num_requests=self.num_running)
            for replica in range(self.info.num_replicas)
        ]

    async def begin_resize(
        self, data_parallel_size: int, *, leaving: Sequence[int] = (), drain_timeout_s: float = DRAIN_TIMEOUT_S
    ) -> asyncio.Task[None]:
        """Raises ConfigError: one brain has all its replicas from the start to the end. See Fleet."""
        raise ConfigError(
            "data_parallel_size",
            data_parallel_size,
            f"{self.info.num_replicas}: replicas that share experts (enable_expert_parallel) cannot come and go yet",
        )

    async def resize(
        self, data_parallel_size: int, *, leaving: Sequence[int] = (), drain_timeout_s: float = DRAIN_TIMEOUT_S
    ) -> None:
        """As `begin_resize`."""
        await self.begin_resize(data_parallel_size, leaving=leaving, drain_timeout_s=drain_timeout_s)

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for running requests, cancel the rest, and end the engine's process.

        By force if it does not end by itself: takes seconds beyond `grace_s` at most. May be called more than once.
        """
        self._is_closing = True
        try:
            if self.dead is None:
                await self._end_running(grace_s)
                self._outbox.put_nowait(Shutdown())
            # An engine that failed ends by itself too, when it has ended its workers.
            await self._child.wait(SHUTDOWN_TIMEOUT_S)
        finally:
            self._child.kill()
            self._die(f"{NAME} was shut down")
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            await self._stream.close()
            if self._attached is not None:
                self._attached.close()

    async def _end_running(self, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.num_running:
                    self._idle.clear()
                    await self._idle.wait()
        cancelled = self._streams.end_all(FinishReason.CANCELLED)
        self._wake(cancelled)
        if cancelled:
            self._outbox.put_nowait(Cancel(tuple(cancelled)))

    async def _read(self, frames: AsyncIterator[bytes]) -> None:
        try:
            async for frame in frames:
                self._take(_decode(frame))
                if self.dead is not None:
                    await self._stream.close()  # tells the engine that its last words were heard
        except PeerDiedError:
            await self._child.wait(LAST_WORDS_S)
            self._die(f"{NAME}'s process (pid {self._child.pid}) ended: {self._child.how_it_ended()}")
        finally:
            # Whatever else ends this task, nobody may go on waiting for what it would have read.
            self._die(f"{NAME}'s messages cannot be read any more")

    async def _listen(self) -> None:
        """End the run when the engine is silent: its process is stopped, or its loop hangs."""
        while self.dead is None:
            began_at = time.monotonic()
            await asyncio.sleep(LISTEN_S)
            # Whatever kept this process itself from running was no silence of the engine: what came is yet to be read.
            self._silent_s += min(time.monotonic() - began_at, 2 * LISTEN_S)
            self._process.look(self._silent_s)
            if self._silent_s > self._silence_timeout_s and self.dead is None:
                steps = (
                    f"after {self.stats.replicas[0].num_steps} steps"
                    if self.stats is not None
                    else "before its first step"
                )
                silence = f"was silent for {self._silent_s:.3g} s, {steps}"
                self._die(f"{NAME}'s process (pid {self._child.pid}) {silence}: it was killed")
                self._child.begin_kill()

    async def _write(self) -> None:
        try:
            while True:
                await self._stream.send(_encode(await self._outbox.get()))
        except PeerDiedError:
            pass  # the reading task says so, with the reason
        except Exception as error:
            # Such as a frame beyond the stream's limit. Whatever comes after it would be waited for in vain.
            self._die(f"nothing can be sent to {NAME} any more: {error}")
            raise

    def _take(self, message: EngineMessage) -> None:
        self._silent_s = 0.0
        if isinstance(message, TokenBatch):
            self._stepped_at = time.monotonic()
            touched, stopped = self._streams.apply(message)
            self._wake(touched)
            if stopped:
                self._outbox.put_nowait(Cancel(tuple(stopped)))
            self._note_idle()
        elif isinstance(message, EngineStats):
            if self.stats is None or _num_steps(message) != _num_steps(self.stats):
                self._stepped_at = time.monotonic()
            self.stats = message
        elif isinstance(message, EngineFailed):
            self._die(message.reason)

    def _die(self, reason: str) -> None:
        if self.dead is None:
            self._ended_by = self._trouble()
            self.dead = reason
            self._wake(list(self._news))

    def _trouble(self) -> VerdictReport | None:
        """What keeps steps from progressing: a rank, says the ledger, or the engine's own process."""
        found = self._attached.standing() if self._attached is not None else None
        return found or self._process.trouble()

    def _wake(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._news[request_id].set()

    def _note_idle(self) -> None:
        if not self.num_running:
            self._idle.set()


def _attach(pid: int) -> Attached | None:
    """To what the engine's process shows of itself; None if it shows nothing, or has just ended."""
    with contextlib.suppress(PeerDiedError, FrameError):
        for found in shown_by(pid):
            if found.instance is not None:
                return Attached(found.instance)
    return None


def _num_steps(stats: EngineStats) -> int:
    return max((replica.num_steps for replica in stats.replicas), default=0)


async def _await_ready(
    frames: AsyncIterator[bytes], child: EngineChild, on_progress: OnProgress | None, silence_s: float
) -> EngineReady:
    phase = "starting"
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = _decode(await anext(frames))
        except TimeoutError:
            raise StartError(NAME, phase, f"nothing was heard of it for {silence_s:.0f} s") from None
        except PeerDiedError:
            await child.wait(LAST_WORDS_S)
            raise StartError(NAME, phase, child.how_it_ended()) from None
        if isinstance(message, EngineReady):
            return message
        if isinstance(message, EngineFailed):
            raise _start_failure(message, phase)
        assert isinstance(message, StartProgress), message
        phase = message.phase
        if on_progress is not None:
            on_progress(message)


def _start_failure(message: EngineFailed, phase: str) -> PhalanxError:
    if message.setting is not None:
        return message.setting.error()
    return UserError(message.reason) if message.is_user_error else StartError(NAME, phase, message.reason)


class _Front(NamedTuple):
    """What the client itself needs of the checkpoint; loaded while the engine starts."""

    tokenizer: Tokenizer
    default_sampling: SamplingParams
    vocab_size: int
    """Of tokens that both the tokenizer and the model have: either may have some that the other lacks."""


async def _load_front(config: Config, ready: asyncio.Task[EngineReady]) -> _Front:
    if not Path(config.model.model).expanduser().is_dir():
        await ready  # by then the engine has fetched and converted the checkpoint
    return await asyncio.to_thread(_read_front, config)


def _read_front(config: Config) -> _Front:
    with _reading:
        return _read_front_alone(config)


def _read_front_alone(config: Config) -> _Front:
    name, directory = config.model.model, Path(config.model.model).expanduser()
    is_local = directory.is_dir()
    checkpoint = Checkpoint(directory, name) if is_local else resolve(name, revision=config.model.revision)
    tokenizer = Tokenizer.load(config.model.tokenizer or checkpoint.path)
    default_sampling = GenerationConfig.read(checkpoint.path).default_sampling()
    return _Front(tokenizer, default_sampling, min(tokenizer.vocab_size, checkpoint.vocab_size))
