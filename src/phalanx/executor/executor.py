"""One Executor over any launcher and any channel: sends commands to all ranks, and gathers their replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, overload

import msgspec

from phalanx.errors import (
    DeadlineError,
    DivergedError,
    EngineDeadError,
    PhalanxError,
    StartError,
    WorkerError,
)
from phalanx.executor.cause import CHANNEL_ERRORS, CauseFinder, UserErrorOfRank
from phalanx.executor.channel import Channel
from phalanx.executor.guarding import Guarding
from phalanx.executor.launcher import Launcher
from phalanx.executor.pending import Pending
from phalanx.executor.watching import Watching
from phalanx.ledger.watch_order import WatchOrder
from phalanx.protocol.client import StartProgress
from phalanx.protocol.worker import (
    Call,
    CallMethod,
    CommandBody,
    Failure,
    Loaded,
    MethodError,
    MethodResult,
    Ping,
    Progress,
    Publish,
    Published,
    Reply,
    ReplyBody,
    Step,
    StepResult,
    Stop,
    WorkerMessage,
)
from phalanx.worker.methods import MethodCallError, encode_arguments

T = TypeVar("T")

OnFailure = Callable[[PhalanxError], None]
"""Called once, with what ended the run."""

OnProgress = Callable[[StartProgress], None]
"""Called with where a rank stands."""

LOAD_CALL = 0
"""The number of the load, which nobody asks for: each worker replies to it when it has loaded."""

PUT_DEADLINE_S = 30.0
POLL_EXITS_S = 0.05
STOP_TIMEOUT_S = 5.0
RPC_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 10.0


class Executor:
    """Sends calls to all ranks and collects their answers. Belongs to one thread.

    The first failure of any rank is final: it is raised by whatever is awaited and by every later call. After `close`
    that is EngineDeadError.
    """

    def __init__(
        self,
        launcher: Launcher,
        channel: Channel,
        world_size: int,
        step_timeout_s: float,
        *,
        output_ranks: Sequence[int],
        resources: ExitStack,
        watching: Watching | None = None,
        guarding: Guarding | None = None,
        nodes: tuple[str, ...] = (),
    ) -> None:
        """`output_ranks` answer for a step, one for each replica. `guarding` compares what ranks have issued.

        `resources` holds what workers use, such as the channel and the rendezvous of their groups; closed last.
        """
        self.world_size = world_size
        self.nodes = nodes
        """By rank, the node of a cluster that it is on. Empty where all are on this host."""
        self._output_ranks = tuple(output_ranks)
        self._launcher = launcher
        self._channel = channel
        self._step_timeout_s = step_timeout_s
        self._calls: dict[int, Pending[Any]] = {}
        self._next_call_id = LOAD_CALL + 1
        self._unheard = set(range(world_size))
        self._published: list[Publish] = []
        self._error: PhalanxError | None = None
        self._on_progress: OnProgress = _tell_nobody
        self._on_failure: list[OnFailure] = []
        self._resources = resources
        self._watching = watching
        self._guarding = guarding
        self._causes = CauseFinder(world_size, launcher, channel, watching)

    def step(self, step: Step) -> Pending[tuple[StepResult, ...]]:
        """Send one step to every rank. Returns at once; the Pending awaits the outcome of each replica."""
        return self._call(step, self._output_ranks, self._step_timeout_s, f"step {step.number}", _step_results)

    def submit(
        self, body: CommandBody, *, ranks: Sequence[int] | None = None, deadline_s: float
    ) -> Pending[list[ReplyBody]]:
        """Send a command to every rank; the Pending gives the answers of `ranks` (all by default), in rank order."""
        ranks = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        return self._call(body, ranks, deadline_s, type(body).__name__, list)

    @overload
    def collective_rpc(
        self,
        method: str,
        args: Sequence[object] = ...,
        kwargs: Mapping[str, object] | None = ...,
        *,
        timeout_s: float = ...,
        unique_reply_rank: int | None = ...,
        non_block: Literal[False] = ...,
    ) -> Any: ...

    @overload
    def collective_rpc(
        self,
        method: str,
        args: Sequence[object] = ...,
        kwargs: Mapping[str, object] | None = ...,
        *,
        timeout_s: float = ...,
        unique_reply_rank: int | None = ...,
        non_block: Literal[True],
    ) -> Pending[Any]: ...

    def collective_rpc(
        self,
        method: str,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
        unique_reply_rank: int | None = None,
        non_block: bool = False,
    ) -> Any:
        """Have every rank call a method that its worker or worker extension declares (`remote_method`).

        Gives the list of what the ranks returned, in rank order, or with `unique_reply_rank` what that rank returned;
        with `non_block` a Pending of it. It runs after all steps that were sent before. Where the method raised, the
        error of the lowest such rank is raised here, as a UserError (wrong name or arguments) or a WorkerError, and the
        run goes on. Raises DeadlineError after `timeout_s`, which ends the run, as a dead rank does.
        """
        if unique_reply_rank is not None and unique_reply_rank not in range(self.world_size):
            raise MethodCallError(
                f"unique_reply_rank: {unique_reply_rank!r} is no rank: there are {self.world_size}, from 0"
            )
        call = CallMethod(method, encode_arguments(tuple(args), kwargs or {}))
        ranks = tuple(range(self.world_size))
        awaited = f"the method {method}"
        pending = self._call(call, ranks, timeout_s, awaited, partial(_returned, unique_reply_rank))
        return pending if non_block else pending.result()

    def on_failure(self, callback: OnFailure) -> None:
        """Have `callback` called when the run ends by a failure; at once if it has. It must not raise.

        Several are called in their order. `close` is no failure.
        """
        self._on_failure.append(callback)
        if self._error is not None and not isinstance(self._error, EngineDeadError):
            callback(self._error)

    def check_health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """Return when every rank has answered. Raises what ended the run, or DeadlineError naming who is silent."""
        self.submit(Ping(), deadline_s=timeout_s).result()

    @property
    def failure(self) -> PhalanxError | None:
        """What has ended the run, if something has: the very error that was raised. `close` is no failure."""
        return None if isinstance(self._error, EngineDeadError) else self._error

    @property
    def watched(self) -> WatchOrder | None:
        """Where the journals of the ranks on this host are; None if none are kept."""
        return self._watching.order if self._watching is not None else None

    def kill(self) -> None:
        """End the ranks, whatever they do: none is left when this returns, and `close` has the rest to do.

        Raises DeadlineError if the kernel cannot end one.
        """
        self._error = self._error or EngineDeadError("the ranks can run no more: they were killed")
        if self._watching is not None:  # before ranks end that shall end
            self._watching.silence()
        self._launcher.close(0.0)

    def await_loaded(self, on_progress: OnProgress, deadline_s: float) -> list[Loaded]:
        """Wait until every rank has its weights. Raises StartError, or the user's mistake that a rank reported.

        A rank that ends before it could say anything is noticed within a twentieth of a second.
        """
        self._on_progress = on_progress
        ranks = range(self.world_size)
        pending: Pending[list[Loaded]] = Pending("the model to be loaded", ranks, deadline_s, self._pump, _all_loaded)
        self._calls[LOAD_CALL] = pending
        while pending.missing:
            self._pump(pending, True, at_most_s=POLL_EXITS_S)
            self._check_exits()
        return pending.result()

    def close(self) -> None:
        """Stop the workers and let everything go. None is left when this returns. Takes seconds at most."""
        with self._resources:
            if self._watching is not None:  # before ranks end that shall end
                self._watching.close()
            if self._error is None:
                self._stop_workers()
            patience_s = STOP_TIMEOUT_S if self._error is None else 0.0
            self._error = self._error or EngineDeadError("the ranks can run no more: their executor was closed")
            # Calls refer to this object, and so may who was told of its start: its memory is to go with the last one
            # who has use for it.
            self._calls.clear()
            self._on_progress = _tell_nobody
            self._launcher.close(patience_s)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self,
        body: CommandBody,
        ranks: Sequence[int],
        deadline_s: float,
        awaited: str,
        convert: Callable[[Sequence[ReplyBody]], T],
    ) -> Pending[T]:
        if self._error is not None:
            raise self._error
        call_id = self._next_call_id
        self._next_call_id += 1
        pending = Pending(awaited, ranks, deadline_s, self._pump, convert)
        if ranks:
            self._calls[call_id] = pending
        try:
            self._channel.put(Call(call_id, body, tuple(ranks)), deadline_s=min(deadline_s, PUT_DEADLINE_S))
        except CHANNEL_ERRORS as error:
            self._take_all()  # a rank that failed said why before it ended
            self._fail(error)
        self._check_in_time(pending)
        return pending

    def _check_in_time(self, pending: Pending[Any]) -> None:
        """An inline rank carries the call out while it is sent, and on a CPU nothing can interrupt it."""
        if not pending.is_late():
            return
        ranks, took_s = pending.awaited_ranks, time.monotonic() - pending.began_at
        self._take_all()  # a rank that failed says more than that it was late
        # What is still to come may have waited for the calls before it: their time was not this one's.
        if not pending.missing or pending.is_late():
            self._fail(DeadlineError(pending.awaited, ranks, took_s))

    def _pump(self, pending: Pending[Any], block: bool, *, at_most_s: float = float("inf")) -> None:
        """Take in one message, waiting for it until the deadline of `pending` if `block`."""
        if self._error is not None:
            raise self._error
        remaining_s = pending.began_at + pending.deadline_s - time.monotonic()
        try:
            received = self._channel.get(timeout_s=max(min(remaining_s, at_most_s), 0.0) if block else 0.0)
        except CHANNEL_ERRORS as error:
            self._fail(error)
        if received is not None:
            self._take(received[0], received[1])
        elif remaining_s <= 0:
            self._fail(DeadlineError(pending.awaited, pending.awaited_ranks, pending.deadline_s))

    def _take_all(self) -> None:
        """Take in what has come. Raises when a rank has failed or died."""
        try:
            while (received := self._channel.get(timeout_s=0.0)) is not None:
                self._take(received[0], received[1])
        except CHANNEL_ERRORS as error:
            self._fail(error)

    def _take(self, rank: int, message: WorkerMessage) -> None:
        self._unheard.discard(rank)
        if isinstance(message, Progress):
            self._on_progress(StartProgress(rank, message.phase, message.done, message.total))
        elif isinstance(message, Failure):
            self._fail(self._causes.cause(rank, message))
        elif isinstance(message, Publish):
            self._published.append(message)
        else:
            self._compare(rank, message.issued)
            if isinstance(message, Reply):
                self._resolve(rank, message)
        # Not before all ranks take it in: it would fill the queue, and one may start much later than another.
        if self._published and not self._unheard:
            entries, self._published = tuple(self._published), []
            self.submit(Published(entries), ranks=(), deadline_s=PUT_DEADLINE_S)

    def _compare(self, rank: int, issued: bytes) -> None:
        """End the run if ranks have diverged: before what they have computed is handed on."""
        if self._guarding is None:
            return
        try:
            self._guarding.take(rank, issued)
        except DivergedError as error:
            self._fail(error)

    def _resolve(self, rank: int, reply: Reply) -> None:
        pending = self._calls[reply.call_id]
        pending.resolve(rank, reply.body)
        if pending.missing:
            return
        del self._calls[reply.call_id]
        # Calls are carried out in turn: one's time begins when all ranks have answered the one before it.
        now = time.monotonic()
        for call_id, later in self._calls.items():
            if call_id > reply.call_id:
                later.began_at = now

    def _fail(self, error: PhalanxError) -> NoReturn:
        self._error = self._causes.judged(error)
        for tell in self._on_failure:
            tell(self._error)
        raise self._error

    def _check_exits(self) -> None:
        """A worker that ended without a word (it may not have come as far as its queue)."""
        for rank, how in self._launcher.exits().items():
            self._take_all()  # its last words first, if there are any
            self._fail(StartError(f"rank {rank}", "starting", how))

    def _stop_workers(self) -> None:
        # That they have stopped shows in their exits: one that leaves before another answered would pass for dead.
        with suppress(PhalanxError):  # the launcher kills workers that the order does not reach
            self.submit(Stop(), ranks=(), deadline_s=STOP_TIMEOUT_S)


def _tell_nobody(_: StartProgress) -> None:
    """Nobody waits for a start."""


def _all_loaded(replies: Sequence[ReplyBody]) -> list[Loaded]:
    return [reply for reply in replies if isinstance(reply, Loaded)]


def _returned(unique_rank: int | None, replies: Sequence[ReplyBody]) -> Any:
    for rank, reply in enumerate(replies):
        if isinstance(reply, MethodError):
            if reply.is_user_error:
                raise UserErrorOfRank(reply.message)
            raise WorkerError(rank, reply.node, reply.kind, reply.message, reply.traceback)
    values = [msgspec.msgpack.decode(reply.value) for reply in replies if isinstance(reply, MethodResult)]
    return values if unique_rank is None else values[unique_rank]


def _step_results(replies: Sequence[ReplyBody]) -> tuple[StepResult, ...]:
    return tuple(reply for reply in replies if isinstance(reply, StepResult))
