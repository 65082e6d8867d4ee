"""The engine as the server has it: a process of its own, and another one when it has ended before its time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec

from phalanx.config import Config
from phalanx.engine.admission import check_request, typed
from phalanx.engine.asked_maintenance import AskedMaintenance, error_of
from phalanx.engine.asked_resize import AskedResizes
from phalanx.engine.asked_weights import NONE, AskedWeights, may_share_weights
from phalanx.engine.child import ENGINE_COMMAND
from phalanx.engine.comeback import Comeback
from phalanx.engine.condition import Condition
from phalanx.engine.engine import DRAIN_TIMEOUT_S, ReplicaState, Strength
from phalanx.engine.front import Front
from phalanx.engine.history import History, with_replicas, without_engine
from phalanx.engine.incarnation import NAME, End, Incarnation, OnProgress
from phalanx.engine.lockstep_draining import LockstepDraining
from phalanx.engine.roster import Phase
from phalanx.engine.stream import Origin, OutputDelta, RequestStream
from phalanx.engine.work import Work
from phalanx.errors import EngineDeadError, MaintenanceError, NotNowError, RequestError, ResizeRefusedError
from phalanx.ledger.status import InstanceStatus
from phalanx.membership.resize import Size
from phalanx.protocol.client import (
    FIRST_WEIGHTS_VERSION,
    AvoidNodes,
    Cancel,
    EngineReady,
    EngineStats,
    Maintained,
    MaintenanceOrder,
    Sleep,
    TokenBatch,
)
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH

StartAgain = Callable[[Config, OnProgress, bytes], Awaitable[Incarnation]]
"""With weights that another engine shares, as in protocol.Begin."""

FindWeights = Callable[[], Awaitable[bytes]]

log = logging.getLogger("phalanx.engine")


async def find_none() -> bytes:
    """No weights to share: there is no other engine."""
    return NONE


class EngineClient:
    """Starts the engine's process, submits requests to it, and hands their output out.

    For one event loop, in a thread that lives as long as the engine: the kernel kills the engine with that thread. An
    engine that ends (it was killed, hung, or failed) is started again as often as `engine_restarts` says, and gets the
    requests that run, each with what it has made so far: their output only pauses. After that the client is `dead`.
    """

    def __init__(
        self,
        config: Config,
        incarnation: Incarnation,
        front: Front,
        start_again: StartAgain,
        weights_version: int = FIRST_WEIGHTS_VERSION,
    ) -> None:
        """Use `start`."""
        self.info = incarnation.info
        self.checkpoint = self._first_checkpoint = incarnation.info.checkpoint
        """The directory that its weights are from: other weights have another one, whatever they are called."""
        self.front = front
        self.tokenizer = front.tokenizer
        self.default_sampling = front.default_sampling
        """For what a request leaves open: the checkpoint's advice (generation_config.json) over our defaults."""
        self.dead: str | None = None
        """Why no more requests are taken; None while they are."""
        self._config = config
        """Of engines that are started from now on."""
        self._vocab_size = front.vocab_size
        self._incarnation = incarnation
        self._maintenance = AskedMaintenance(weights_version)
        self.find_weights: FindWeights = find_none
        """Where an engine that is started again may find them."""
        self._resizes = AskedResizes(lambda message: self._incarnation.send(message), self._on_resized)
        self._draining = LockstepDraining(config, self, self._resizes, self._check_may_resize)
        self._weights = AskedWeights(lambda message: self._incarnation.send(message))
        self._start_again = start_again
        self._comeback = Comeback(
            config.executor.engine_restarts,
            self._begin_again,
            succeed=self._succeed,
            give_up=self._die,
            num_waiting=lambda: self.num_running,
        )
        self._history = History()
        self._work = Work()
        self._news: dict[int, asyncio.Event] = {}
        self._idle = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._is_closing = False
        self._request_ids = itertools.count()
        self._attend(incarnation)

    @classmethod
    async def start(
        cls,
        config: Config,
        on_progress: OnProgress | None = None,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        front: Front | None = None,
        weights_version: int = FIRST_WEIGHTS_VERSION,
        weights: bytes = NONE,
    ) -> EngineClient:
        """Start the engine's process and wait until it serves.

        `environment` is for the engine, besides this process's own; `front` and `weights_version` are those of another
        client of the same model, and `weights` what its engine shares. `on_progress` is called in the event loop.
        Raises UserError for the user's mistakes and StartError for the rest, also when nothing is heard for
        `start_timeout_s`. If it raises or is cancelled, no process is left.
        """
        begin = partial(Incarnation.start, command=command, environment=environment)
        beginning = asyncio.create_task(begin(config, on_progress, weights))
        reading = asyncio.create_task(_front(config, beginning, front))
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
        return cls(config, incarnation, found, begin, weights_version)

    @property
    def down(self) -> str | None:
        """Why the engine is being started again; None when it is not. Requests wait meanwhile."""
        return self._comeback.down

    @property
    def nodes(self) -> tuple[str, ...]:
        """By rank, the node of a cluster that it is on, as the engine has told last. Empty without a cluster."""
        stats = self._incarnation.stats
        return () if stats is None else stats.nodes

    def has_left(self, node: str) -> bool:
        """Whether no rank is on this node of a cluster, nor will be, as the engine says since it avoids it."""
        if self.dead is not None:
            return True
        stats = self._incarnation.stats
        is_told = self.down is None and stats is not None and node in stats.avoided
        return is_told and node not in self.nodes

    @property
    def lacks_room(self) -> str | None:
        """What is missing on the nodes of a cluster, if that is why no ranks serve; None if it is not."""
        stats = self._incarnation.stats
        healing = stats.formation if stats is not None and self.down is None and self.dead is None else None
        return self._comeback.lacks_room if healing is None else healing.lacks_room

    def avoid(self, nodes: tuple[str, ...]) -> None:
        """Have ranks that are placed from now on come to other nodes of the cluster. Those that are there stay."""
        cluster = msgspec.structs.replace(self._config.cluster, avoid_nodes=nodes)
        self._config = msgspec.structs.replace(self._config, cluster=cluster)
        if self.dead is None and self.down is None:
            self._incarnation.send(AvoidNodes(nodes))

    @property
    def weights_version(self) -> int:
        """Of what the next tokens are made with."""
        return self._maintenance.weights_version

    async def share_weights(self) -> bytes:
        """Its ranks' weights for those of another engine on this host, as in protocol.Begin; NONE if it has none."""
        if not may_share_weights(self._config, self.info.device):
            return NONE
        if self.dead is not None or self.down is not None or self._maintenance.is_under_way or self.asleep:
            return NONE
        return await self._weights.ask()

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
            phase=self._comeback.phase,
            num_restarts=self._history.num_restarts,
            verdicts=self._history.verdicts_with(now.verdicts),
            num_watcher_restarts=self._history.num_watcher_restarts + now.num_watcher_restarts,
            formation=self._history.formation_with(now.formation),
            weights_version=self.weights_version,
        )

    def conditions(self) -> Sequence[Condition]:
        return (self.condition,)

    @property
    def strength(self) -> Strength:
        """Ranks in lockstep are all there, or none."""
        return Strength(wanted=self.info.num_replicas, drained_nodes=self._config.cluster.avoid_nodes)

    def statuses(self) -> Sequence[InstanceStatus]:
        """How each rank is, of those on this host. Takes milliseconds; for any thread."""
        return self._incarnation.statuses()

    @property
    def asleep(self) -> int:
        """The level of its sleep, in which requests wait; 0 while it is awake."""
        return self._maintenance.sleep_level

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
        if self._resizes.is_under_way:
            raise NotNowError("a resize is under way")
        if self._maintenance.is_under_way:
            raise NotNowError("another reload, sleep or wake is under way")
        maintained = self._maintenance.begin(weights_version)
        self._incarnation.send(order)
        await asyncio.shield(maintained)

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
        return [*there, *self._resizes.joining()]

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
        self._check_may_resize()
        return await self._resizes.begin(self.size, self.size.changed(data_parallel_size, tensor_parallel_size))

    async def begin_drain(self, node: str, *, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> asyncio.Task[None]:
        """As Engine.begin_drain. Requests go on with the ranks that take over, so nobody waits for them to end."""
        return await self._draining.begin(node)

    async def undo_drain(self, node: str) -> None:
        """As Engine.undo_drain."""
        await self._draining.undo(node)

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
                await self._draining.close()
                await self._comeback.cancel()
            finally:
                try:
                    await self._incarnation.end()
                finally:  # also when the kernel cannot end it: nobody may go on waiting for it
                    self._die(f"{NAME} was shut down")
                    self._incarnation.forget()

    def _check_may_resize(self) -> None:
        """Raises ResizeRefusedError, EngineDeadError."""
        self._resizes.check_none()
        self._check_lives()
        if self.down is not None:
            raise ResizeRefusedError(f"{NAME} is being started again: resize when it serves")
        if self.asleep or self._maintenance.is_under_way:
            raise ResizeRefusedError(f"{NAME} is asleep, or is just getting other weights: resize when it serves")

    def _on_resized(self, ready: EngineReady, size: Size) -> None:
        self.info = ready
        parallel = msgspec.structs.replace(self._config.parallel, **size._asdict())
        self._config = msgspec.structs.replace(self._config, parallel=parallel)

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
        if outcome.model is not None:
            self._config = self._config.with_model(outcome.model, self._first_checkpoint)
            self.checkpoint = outcome.model
        stats = self._incarnation.stats
        maintenance = stats.maintenance if stats is not None else None
        self._maintenance.note(outcome, 0 if maintenance is None else maintenance.level)
        self._note_settled()
        self._maintenance.end(error_of(outcome))

    def _note_settled(self) -> None:
        if self.dead is not None or (self.down is None and not self.asleep):
            self._settled.set()
        else:
            self._settled.clear()

    def _on_end(self, end: End) -> None:
        """The engine has ended: this is the end of all, or the time until there is another one begins."""
        self._maintenance.end(
            MaintenanceError(f"the engine has ended, and begins with the weights of before: {end.reason}")
        )
        self._resizes.give_up(end.reason)
        self._weights.give_up()
        if self._is_closing or end.is_user_error:
            self._die(end.reason)
            return
        self._wake(self._work.engine_ended(end.reason, is_from_outside=end.is_from_outside))
        self._comeback.begin(self._incarnation, end.reason)
        self._note_settled()

    async def _begin_again(self, on_progress: OnProgress) -> Incarnation:
        return await self._start_again(self._config, on_progress, await self.find_weights())

    def _succeed(self, incarnation: Incarnation) -> None:
        before, self._incarnation = self._incarnation, incarnation
        self._history.add(before.stats, before.condition)
        before.forget()
        self.info = incarnation.info
        if self.info.checkpoint != self.checkpoint:  # it was started with a link, which names another one by now
            log.warning("the engine has come back with weights of %s, not of %s", self.info.checkpoint, self.checkpoint)
            self.checkpoint = self.info.checkpoint
            self._maintenance.weights_version += 1
        self._comeback.note_over()
        self._note_settled()
        self._attend(incarnation)
        if self.asleep:
            incarnation.send(Sleep(2 if self.asleep == 2 else 1))
        self._submit_next()

    def _attend(self, incarnation: Incarnation) -> None:
        incarnation.attend(self._take, self._on_maintained, self._on_end, self._resizes.note, self._weights.note)
        if self._config.executor.launcher == "ray":  # it may have changed while it started
            incarnation.send(AvoidNodes(self._config.cluster.avoid_nodes))

    def _die(self, reason: str) -> None:
        if self.dead is None:
            self.dead = reason
            self._comeback.note_over()
            self._note_settled()
            self._resizes.give_up(reason)
            self._wake(list(self._news))

    def _wake(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._news[request_id].set()

    def _note_idle(self) -> None:
        if not self.num_running:
            self._idle.set()


async def _front(config: Config, beginning: asyncio.Task[Incarnation], known: Front | None) -> Front:
    return known if known is not None else await Front.load(config, beginning)
