"""The brain: takes requests, keeps the workers busy, lets committed tokens out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.engine.pace import Pace
from phalanx.engine.replica import Replica
from phalanx.engine.request import Request, new_seed
from phalanx.engine.scheduler import PlannedStep, Scheduler
from phalanx.engine.suspects import Suspects
from phalanx.errors import RequestError
from phalanx.protocol.client import EngineStats, ReplicaStats, Submit, TokenBatch
from phalanx.protocol.columns import as_ints
from phalanx.protocol.sampling import FinishReason
from phalanx.protocol.worker import FIRST_EPOCH, CopyBlocks, Step, StepResult

SET_ASIDE_LOOK_S = 0.002
"""Whether blocks have come back, without which no step can be planned, is asked this often."""

EXPECTS_FOR_STEPS = 8
"""After tokens of a request that is to move here were computed: it comes soon, and goes into the very next step."""

T = TypeVar("T", covariant=True)


class Pending(Protocol[T]):
    """An answer to come."""

    def result(self) -> T:
        """Block until it is there. Raises what kept it from coming, at the latest at its deadline."""


class StepExecutor(Protocol):
    """Carries out steps, in the order in which they come."""

    def step(self, step: Step) -> Pending[tuple[StepResult, ...]]: ...


class _InFlight(NamedTuple):
    """A step that was sent."""

    planned: PlannedStep
    moving: Pending[object] | None
    """An exchange of experts before it, whose answers come first."""
    pending: Pending[tuple[StepResult, ...]]
    sent_at: float


class Brain:
    """Everything that is decided about requests, in one place and one thread.

    With async scheduling the plan of one step is sent while the step before it computes. In a pipeline as many steps
    are under way as it has stages.
    """

    def __init__(
        self,
        config: Config,
        executor: StepExecutor,
        *,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        balancing: Balancing | None = None,
    ) -> None:
        """`balancing`: with `enable_eplb`."""
        self._executor = executor
        self._eos_token_ids = eos_token_ids
        scheduler = self.scheduler_for(config, FIRST_EPOCH, num_blocks=num_blocks, max_model_len=max_model_len)
        self._build(config, scheduler, num_blocks=num_blocks, max_model_len=max_model_len, balancing=balancing)
        self._in_flight: deque[_InFlight] = deque()
        self._suspects = Suspects()
        self._pace = Pace()
        self._committed_at = 0.0
        self._expects_for = 0
        """So many steps more."""
        self._ended: list[tuple[int, FinishReason]] = []
        """Not by a step, which would tell."""
        self._errors: list[tuple[int, str]] = []
        """Why, for some of these."""
        self._num_submitted = 0
        self._is_held = False

    def _build(
        self, config: Config, scheduler: Scheduler, *, num_blocks: int, max_model_len: int, balancing: Balancing | None
    ) -> None:
        """What depends on the workers that there are."""
        assert (balancing is not None) == config.parallel.enable_eplb
        self._balancing = balancing
        self._max_model_len = max_model_len
        self._block_size = config.cache.block_size
        self._num_blocks = num_blocks
        self._depth = _depth(config)
        self._is_pipelined = config.parallel.pipeline_parallel_size > 1
        self._scheduler = scheduler

    def scheduler_for(self, config: Config, epoch: int, *, num_blocks: int, max_model_len: int) -> Scheduler:
        """One without requests for other workers, such as `restructure` may take."""
        is_pipelined = config.parallel.pipeline_parallel_size > 1
        return Scheduler(
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=config.cache.block_size,
            num_blocks=num_blocks,
            is_prefix_caching=config.cache.enable_prefix_caching,
            eos_token_ids=self._eos_token_ids,
            is_pipelined=is_pipelined,
            num_micro_batches=_depth(config) if is_pipelined else 1,
            num_replicas=config.parallel.data_parallel_size,
            epoch=epoch,
        )

    def tokens_of_running(self) -> list[NDArray[np.int32]]:
        """Prompt and output so far of each request that runs."""
        return self._scheduler.tokens_of_running()

    def submit(self, request: Submit) -> None:
        """Queue a request. Raises RequestError if it could never run."""
        num_prompt, sampling = len(as_ints(request.prompt_token_ids)), request.sampling
        max_len = self._max_len(request)
        self._scheduler.add(
            Request(
                request_id=request.request_id,
                arrival=self._num_submitted,
                token_ids=as_ints(request.prompt_token_ids + request.output_token_ids),
                num_prompt=num_prompt,
                max_len=max_len,
                sampling=sampling,
                seed=new_seed() if sampling.seed is None else sampling.seed,
                end_token_ids=sampling.stop_token_ids + (() if sampling.ignore_eos else self._eos_token_ids),
                is_rehearsal=request.is_rehearsal,
            )
        )
        self._num_submitted += 1

    def cancel(self, request_ids: Iterable[int]) -> None:
        """End requests, whether they wait, run or are in a step under way. Ids of requests that are over are ignored.

        The next `step` tells that they have ended.
        """
        for request_id in self._scheduler.cancel(request_ids):
            self._ended.append((request_id, FinishReason.CANCELLED))
            self._suspects.ended([request_id])
        self._hold_back()

    def reset_prefix_cache(self) -> None:
        """Call it when the weights change: requests that come in from now on compute their prompts anew.

        Those that run keep the keys and values that they have, and find themselves in the cache no more.
        """
        self._scheduler.reset_prefix_cache()

    def hold(self) -> None:
        """Plan nothing until `go_on`: what is under way is committed, and all requests wait."""
        self._is_held = True

    def admit_no_more(self) -> None:
        """Until `go_on` requests that come in wait; those that are here run to their ends."""
        self._scheduler.admit_until(self._num_submitted)

    def go_on(self) -> None:
        """After `hold` or `admit_no_more`."""
        self._is_held = False
        self._scheduler.admit_until(None)

    @property
    def is_between_steps(self) -> bool:
        """Whether none is under way."""
        return not self._in_flight

    @property
    def has_admitted(self) -> bool:
        """Whether requests are left that may run, of those who came in before `admit_no_more`."""
        return self._scheduler.has_admitted()

    def recompute(self) -> None:
        """Between steps: have everything computed anew that requests have in the KV cache, and forget all of it.

        For other weights, or a cache that was lost. The same workers go on.
        """
        assert self.is_between_steps
        self._scheduler.recompute()

    def have_other_weights(self) -> None:
        """Between steps: ranks have those of a checkpoint now, with experts that move where they are at first."""
        assert self.is_between_steps
        if self._balancing is not None:
            self._balancing.begin_again()

    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        may_plan = not self._is_held and self._scheduler.has_admitted()
        return bool(may_plan or self._in_flight or self._ended)

    def step(self) -> TokenBatch | None:
        """One turn: send plans as far as they may run ahead, then wait for the oldest step and commit it.

        Gives what left the brain in this turn, if anything did. Blocks for as long as that step takes; raises what the
        executor raises (WorkerError, PeerDiedError, DeadlineError). Then nothing has left, and after `rewind` it goes
        on as if the steps under way had never been planned.
        """
        may_plan = not self._is_held
        while may_plan and len(self._in_flight) < self._depth_now and (planned := self._plan()) is not None:
            moving = None if self._balancing is None else self._balancing.before_step()
            sent_at = time.monotonic()
            self._in_flight.append(_InFlight(planned, moving, self._executor.step(planned.step), sent_at))
        batch = TokenBatch(b"", b"")
        if self._in_flight:
            oldest = self._in_flight[0]
            if oldest.moving is not None:
                oldest.moving.result()
            batch = self._commit(oldest.planned, oldest.pending.result())
            self._note_pace(oldest)
            self._in_flight.popleft()
        elif self._scheduler.has_set_aside:
            time.sleep(SET_ASIDE_LOOK_S)  # requests may be left that have no room before blocks come back
        else:
            assert self._is_held or not self._scheduler.has_admitted(), "requests are left that can never run"
        if self._ended:
            finished, errors = batch.finished + tuple(self._ended), batch.errors + tuple(self._errors)
            batch = msgspec.structs.replace(batch, finished=finished, errors=errors)
            self._ended, self._errors = [], []
        return batch if batch.tokens or batch.finished else None

    @property
    def num_steps(self) -> int:
        """That were committed."""
        return self._scheduler.totals.num_steps

    def rewind(
        self,
        epoch: int,
        *,
        keeps_cache: bool,
        failure: str | None = None,
        is_from_outside: bool = False,
        sets_aside: bool = False,
    ) -> bool:
        """Forget the steps under way, and go on with new workers from what is committed: every token leaves once.

        `epoch` is that of the new workers, which know nothing and come to the executor before the next `step`. Those
        before them must have ended, or at least write to the KV cache no more. `keeps_cache`: the new ones have it as
        these left it; otherwise theirs is empty, and every request is computed anew from its tokens.

        With `sets_aside` those before them may be about to end: blocks that they may write to are set aside until
        `restore_blocks`. True if the next step need not wait for their end; as always once they have ended. In either
        case the new workers carry out `copies` before it.

        `failure` says what went wrong, if anything did. A request that is in steps that fail again and again, and fails
        alone as well, ends with an error that quotes it: the next `step` tells. `is_from_outside`: as far as anybody
        can tell it was no request's doing (blame.py); then others must have run without it, and without a failure.
        """
        self._drop_in_flight(failure, is_from_outside=is_from_outside)
        may_go_on = self._scheduler.rewind(epoch, keeps_cache=keeps_cache, sets_aside=sets_aside)
        if self._balancing is not None:
            self._balancing.begin(epoch)
        self._hold_back()
        return may_go_on

    @property
    def copies(self) -> tuple[CopyBlocks, ...]:
        """What workers are to do in turn after a rewind, before the next step."""
        return self._scheduler.copies

    def restore_blocks(self) -> bool:
        """Workers that were about to end at a rewind have ended. False if it is too early: call it again."""
        return self._scheduler.restore_blocks()

    def restructure(
        self,
        config: Config,
        epoch: int,
        *,
        num_blocks: int,
        max_model_len: int,
        balancing: Balancing | None = None,
        failure: str | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        """Like `rewind`, for new workers of another number or with other limits, whose KV cache is empty.

        With `scheduler`, which `scheduler_for` has made with the same arguments, it is as that has left it.
        All requests move over, in order of arrival, and totals go on. Requests have the room that they would have if
        they came in now. One that has more tokens already than there is room for ends with an error that says so.
        """
        self._drop_in_flight(failure)
        before = self._scheduler
        if scheduler is None:
            scheduler = self.scheduler_for(config, epoch, num_blocks=num_blocks, max_model_len=max_model_len)
        self._build(config, scheduler, num_blocks=num_blocks, max_model_len=max_model_len, balancing=balancing)
        if balancing is not None:
            balancing.begin(epoch)
        self._scheduler.go_on_after(before)
        for request in before.dismiss():
            self._move(request)
        self._hold_back()

    def stats(self) -> EngineStats:
        """What there is now, and counts since the start."""
        balance = None if self._balancing is None else self._balancing.stats
        return EngineStats(tuple(map(self._stats_of, self._scheduler.replicas)), balance)

    @property
    def _depth_now(self) -> int:
        """Who is to move here pauses until a step has room for it, and so finds no other one planned before it."""
        return 1 if self._expects_for and not self._is_pipelined else self._depth

    def _plan(self) -> PlannedStep | None:
        planned = self._scheduler.plan(self._pace.limits)
        if planned is not None:
            self._expects_for = EXPECTS_FOR_STEPS if planned.tokens.ahead else max(self._expects_for - 1, 0)
        return planned

    def _note_pace(self, step: _InFlight) -> None:
        now = time.monotonic()
        took_s, self._committed_at = now - max(step.sent_at, self._committed_at), now
        self._pace.note(took_s, step.planned.tokens)

    def _commit(self, planned: PlannedStep, results: tuple[StepResult, ...]) -> TokenBatch:
        if not self._suspects:
            return self._scheduler.commit(planned, results)
        reach = self._scheduler.reach(planned)
        batch = self._scheduler.commit(planned, results)
        self._suspects.committed(reach)
        self._suspects.ended(request_id for request_id, _ in batch.finished)
        self._hold_back()
        return batch

    def _hold_back(self) -> None:
        """Those that are not to run as long as somebody is suspected."""
        aside = self._suspects.aside if len(self._scheduler) > 1 else None
        self._scheduler.hold_back(all_but=self._suspects.alone, aside=aside)

    def _drop_in_flight(self, failure: str | None, *, is_from_outside: bool = False) -> None:
        """`failure`: why they will never be committed, if it may be the fault of a request in them."""
        self._in_flight.clear()
        if failure is None:
            return
        errors = self._suspects.failed(self._scheduler.under_way(), failure, is_from_outside=is_from_outside)
        for request_id in self._scheduler.cancel(errors):
            self._end_with_error(request_id, errors[request_id])

    def _move(self, request: Request) -> None:
        """Queue a request that was here before there were other workers."""
        num_tokens, room = len(request.token_ids), self._room + 1  # the last token is never computed
        max_len = min(self._longest(request.num_prompt, request.sampling.max_tokens), room)
        if num_tokens >= max_len:
            self._suspects.ended([request.request_id])
            self._end_with_error(
                request.request_id,
                f"the engine has changed its size: it now has room for {max_len} tokens of prompt and output, and this "
                f"request has {num_tokens}",
            )
            return
        self._scheduler.add(replace(request, max_len=max_len, digests=[]))  # blocks may be of another size

    def _end_with_error(self, request_id: int, error: str) -> None:
        self._ended.append((request_id, FinishReason.ERROR))
        self._errors.append((request_id, error))

    def _stats_of(self, replica: Replica) -> ReplicaStats:
        totals, p = self._scheduler.totals, replica.index
        return ReplicaStats(
            num_running=self._scheduler.running.num_in(p),
            num_waiting=len(replica.waiting),
            num_blocks_used=self._num_blocks - replica.pool.num_free,
            num_blocks=self._num_blocks,
            num_steps=totals.num_steps,
            num_preemptions=int(totals.num_preemptions_P[p]),
            num_prompt_tokens=int(totals.num_prompt_tokens_P[p]),
            num_cached_tokens=int(totals.num_cached_tokens_P[p]),
            num_generated_tokens=int(totals.num_generated_tokens_P[p]),
        )

    def _max_len(self, request: Submit) -> int:
        """The longest that the request can get. Raises RequestError if it is wrong or there is no room for that."""
        num_prompt, num_output = len(as_ints(request.prompt_token_ids)), len(as_ints(request.output_token_ids))
        max_tokens = request.sampling.max_tokens
        if request.request_id in self._scheduler:
            raise RequestError("request_id", request.request_id, "a request with this id is running")
        if num_prompt == 0:
            raise RequestError("prompt", [], "it must have at least one token")
        if num_prompt >= self._max_model_len:
            raise RequestError("prompt", f"{num_prompt} tokens", f"at most {self._max_model_len - 1}")
        max_len, room = self._longest(num_prompt, max_tokens), self._room
        if max_len - 1 > room:  # the last token is never computed
            field, value = ("prompt", num_prompt) if num_prompt > room else ("max_tokens", max_tokens)
            raise RequestError(
                field, value, f"prompt and output share {room + 1} tokens: kv_cache_memory has no room for more"
            )
        if num_prompt + num_output >= max_len:  # made by an engine with a higher limit
            most = max_len - num_prompt - 1
            raise RequestError("output", f"{num_output} tokens", f"it fills the context: at most {most} can go on")
        return max_len

    def _longest(self, num_prompt: int, max_tokens: int | None) -> int:
        """How long a request can get, as far as it is for the model and the request to say."""
        return self._max_model_len if max_tokens is None else min(num_prompt + max_tokens, self._max_model_len)

    @property
    def _room(self) -> int:
        """Tokens of one request that the KV cache can hold."""
        return self._num_blocks * self._block_size


def _depth(config: Config) -> int:
    """Steps under way at a time."""
    return max(config.parallel.pipeline_parallel_size, 2) if config.scheduler.async_scheduling else 1
