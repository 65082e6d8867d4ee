"""Which tokens of which requests the next step computes, and what follows from its outcome.

A pure core: no processes, no clock. Continuous batching (Orca, OSDI 2022) over a paged KV cache (vLLM, SOSP 2023) with
chunked prefill (Sarathi-Serve, OSDI 2024). Plans may run ahead of outcomes: a row in flight counts as one token longer.

Shape suffixes: R rows of a step, S rows of it that sample, B blocks of a
request, E entries of log-probabilities.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.block_pool import BlockPool, Blocks
from phalanx.engine.prefix_cache import ROOT, PrefixCache, block_digest, extend_digests
from phalanx.engine.request import Counts, Request, Running, Slots
from phalanx.protocol import (
    FIRST_EPOCH,
    NO_TOKEN,
    FinishReason,
    Ints,
    LogprobColumns,
    NewRequest,
    StepPlan,
    StepResult,
    StepShape,
    TokenBatch,
    as_floats,
    as_ints,
    ints,
)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A plan and what its commit needs to know of it."""

    plan: StepPlan
    slots_R: Slots
    tickets_R: Counts
    num_tokens_R: Counts
    ends_R: Counts
    """Tokens of each sequence that are in the KV cache after the step."""
    samples_R: NDArray[np.bool_]


@dataclass(slots=True)
class Totals:
    """Counts since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0


class Scheduler:
    """Plans steps and commits them, in the same order. Plans may be ahead of commits by any number of steps.

    A pipeline is to be busy with `num_micro_batches` steps at a time. Its first stage gets sampled tokens from the
    plans, so a sequence whose newest token is under way decodes no further before that is committed; and each step
    takes no more than its share of the sequences that decode, or the other steps would find none.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        is_prefix_caching: bool,
        eos_token_ids: tuple[int, ...],
        is_pipelined: bool = False,
        num_micro_batches: int = 1,
    ) -> None:
        assert is_pipelined or num_micro_batches == 1, num_micro_batches
        assert max_num_batched_tokens >= max_num_seqs, "every running request must find room in a step"
        self.totals = Totals()
        self.cache = PrefixCache(num_blocks)
        self.pool = BlockPool(num_blocks, self.cache)
        self.running = Running(max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size)
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self._requests: dict[int, Request] = {}
        self._max_num_batched_tokens = max_num_batched_tokens
        self._block_size = block_size
        self._is_prefix_caching = is_prefix_caching
        self._eos_token_ids = eos_token_ids
        self._is_pipelined = is_pipelined
        self._num_micro_batches = num_micro_batches
        self._first_cached_ticket = 0
        """Who came in before does not fill the prefix cache: some of its keys and values are from before a reset."""
        self._dropped: list[int] = []
        self._next_step = 0

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Queue a request. The pool must be able to hold it when it is alone, or it would wait for ever."""
        assert request.request_id not in self._requests
        assert self._num_blocks(request.max_len - 1) <= self.pool.num_blocks
        self._requests[request.request_id] = request
        self.waiting[request.request_id] = request

    def cancel(self, request_ids: Iterable[int]) -> list[int]:
        """Forget requests, whatever they are doing; gives the ids of those that had not ended."""
        cancelled = []
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            if request.slot is None:
                del self.waiting[request_id]
            else:
                self._vacate(request.slot)
            cancelled.append(request_id)
        return cancelled

    def reset_prefix_cache(self) -> None:
        """Let no request that comes in from now on find what was computed, or depends on what was computed, until now.

        Those that run go on with what they have. One that gives way computes all its tokens anew.
        """
        self.pool.reset_cache()
        self._first_cached_ticket = self.running.next_ticket

    def plan(self) -> PlannedStep | None:
        """The next step, or None if there is nothing to compute before an earlier step is committed.

        First one token of every sequence that decodes, then the prompts that are under way, then requests that wait, in
        order of arrival, each with as much of its prompt as fits. When blocks run out, the last to arrive gives way.
        """
        running = self.running
        decoding_R, growing_R = self._find_room_for_decoding()
        new_blocks_R = self.pool.take(len(growing_R))
        running.append_blocks(growing_R, new_blocks_R)
        budget = self._max_num_batched_tokens - len(decoding_R)

        prefilling: list[int] = running.prefilling().tolist()
        chunks: list[tuple[int, int]] = []
        new: list[NewRequest] = []
        while budget:
            if len(chunks) < len(prefilling):
                slot = prefilling[len(chunks)]
            elif self.waiting and (admitted := self._admit_next()) is not None:
                slot = admitted
                new.append(running.describe(slot, self._eos_token_ids))
            else:
                break
            num_tokens = min(running.num_missing(slot), budget)
            chunks.append((slot, num_tokens))
            budget -= num_tokens

        slots_R, num_tokens_R = _rows(decoding_R, chunks)
        if not len(slots_R):
            return None
        return self._planned(slots_R, num_tokens_R, growing_R, new_blocks_R, new)

    def plan_nothing(self) -> PlannedStep:
        """The next step without a token to compute: for a replica whose peers have some."""
        none = np.empty(0, dtype=np.intp)
        return self._planned(none, np.empty(0, dtype=np.int64), none, np.empty(0, dtype=np.int32), [])

    def num_cached(self, request: Request) -> int:
        """Tokens of the request that the prefix cache holds now."""
        return len(self._find_cached(request)) * self._block_size

    def commit(self, step: PlannedStep, result: StepResult) -> TokenBatch:
        """Take in what a step made; gives the tokens that may leave now and the requests that they end."""
        assert result.step == step.plan.step, f"step {step.plan.step} was answered as step {result.step}"
        tokens_S = as_ints(result.tokens)
        assert len(tokens_S) == step.plan.shape.num_samples
        failed = self._fail_without_token(step, tokens_S)
        # Rows whose request ended, was cancelled or gave way after the step was planned have no effect.
        is_live_R = self.running.ticket_S[step.slots_R] == step.tickets_R
        if self._is_prefix_caching:
            self._cache_filled_blocks(step, is_live_R)
        is_live_S = is_live_R[step.samples_R]
        slots_S, tokens_S = step.slots_R[step.samples_R][is_live_S], tokens_S[is_live_S]
        lengths_S = self.running.append_tokens(slots_S, tokens_S)
        request_ids_S = self.running.request_id_S[slots_S]
        self.totals.num_steps += 1
        self.totals.num_generated_tokens += len(slots_S)
        cached = self._note_first_tokens(slots_S, lengths_S)
        return TokenBatch(
            request_ids=request_ids_S.tobytes(),
            tokens=ints(tokens_S),
            finished=self._finish(slots_S, tokens_S, lengths_S) + tuple((i, FinishReason.ERROR) for i in failed),
            logprobs=_keep_entries(result.logprobs, is_live_S),
            errors=tuple((i, "the model gave logits that no token can be chosen from") for i in failed),
            cached=cached,
        )

    # ---------------------------------------------------------------------------- room

    def _find_room_for_decoding(self) -> tuple[Slots, Slots]:
        """Who decodes in this step, and who of them needs one more block. When this returns, the pool has these."""
        decoding_R = self._decoding()
        growing_R = self.running.without_room(decoding_R)
        while len(growing_R) > self.pool.num_free:
            if self.running.any_ending():  # its blocks come back with a step that is under way: pausing is cheaper
                decoding_R = np.setdiff1d(decoding_R, growing_R[self.pool.num_free :], assume_unique=True)
            else:
                self._preempt(self.running.last_arrived())
                decoding_R = self._decoding()
            growing_R = self.running.without_room(decoding_R)
        return decoding_R, growing_R

    def _decoding(self) -> Slots:
        """Who may decode in this step."""
        decoding_R = self.running.decoding()
        if not self._is_pipelined:
            return decoding_R
        return self.running.longest_idle(decoding_R, limit=-(-len(decoding_R) // self._num_micro_batches))

    def _admit_next(self) -> int | None:
        """Give the request that has waited longest a slot and blocks for all its tokens; None if there is no room."""
        if not self.running.has_free_slot:
            return None
        request = next(iter(self.waiting.values()))
        found_B = self._find_cached(request)
        num_missing = self._num_blocks(len(request.token_ids)) - len(found_B)
        # Everyone that runs soon needs its next block: without these to spare, who comes in now would give way at once.
        num_spare = len(self.running)
        if num_missing + self.pool.num_idle(found_B) + num_spare > self.pool.num_free:
            return None
        self.pool.share(found_B)
        blocks_B = np.concatenate([found_B, self.pool.take(num_missing)])
        num_computed = len(found_B) * self._block_size
        if request.num_cached is None:
            request.num_cached = num_computed
        del self.waiting[request.request_id]
        return self.running.add(request, blocks_B, num_computed)

    def _preempt(self, slot: int) -> None:
        """Back to the front of the queue. What is under way for it is lost: it is computed again with the rest."""
        request = self._vacate(slot)
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)
        self.totals.num_preemptions += 1

    def _vacate(self, slot: int) -> Request:
        request, blocks_B = self.running.remove(slot)
        self.pool.release(blocks_B)
        self._dropped.append(slot)
        return request

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ---------------------------------------------------------------------------- prefix cache

    def _find_cached(self, request: Request) -> Blocks:
        """Blocks that hold the beginning of the request's tokens. Never all: the last token's logits are wanted."""
        if not self._is_prefix_caching:
            return np.empty(0, dtype=np.int32)
        num_full = (len(request.token_ids) - 1) // self._block_size
        extend_digests(request.digests, request.token_ids, self._block_size, num_full)
        return np.array(self.cache.find(request.digests[:num_full]), dtype=np.int32)

    def _cache_filled_blocks(self, step: PlannedStep, is_live_R: NDArray[np.bool_]) -> None:
        """Let blocks be found that the step has filled."""
        running = self.running
        firsts_R, ends_R = (step.ends_R - step.num_tokens_R) // self._block_size, step.ends_R // self._block_size
        rows = np.flatnonzero(is_live_R & (firsts_R < ends_R) & (step.tickets_R >= self._first_cached_ticket))
        for slot, first, end in zip(
            step.slots_R[rows].tolist(), firsts_R[rows].tolist(), ends_R[rows].tolist(), strict=True
        ):
            digests = running.request(slot).digests
            for place in range(first, end):
                if place == len(digests):
                    content = running.token_ids_SBO[slot, place].tobytes()
                    digests.append(block_digest(digests[-1] if digests else ROOT, content))
                self.cache.insert(digests[place], int(running.block_ids_SB[slot, place]))

    # ---------------------------------------------------------------------------- plan and outcome

    def _planned(
        self, slots_R: Slots, num_tokens_R: Counts, growing_R: Slots, new_blocks_R: Blocks, new: list[NewRequest]
    ) -> PlannedStep:
        token_slots, tokens = self._sampled_tokens(slots_R)
        ends_R, samples_R = self.running.advance(slots_R, num_tokens_R, self._next_step)
        shape = StepShape(int(num_tokens_R.sum()), len(slots_R), int(np.count_nonzero(samples_R)))
        plan = StepPlan(
            epoch=FIRST_EPOCH,
            step=self._next_step,
            shape=shape,
            slots=slots_R.astype(np.int32).tobytes(),
            num_tokens=num_tokens_R.astype(np.int32).tobytes(),
            block_slots=growing_R.astype(np.int32).tobytes(),
            block_ids=new_blocks_R.tobytes(),
            dropped=ints(self._dropped),
            new=tuple(new),
            token_slots=token_slots,
            tokens=tokens,
        )
        self._dropped = []
        self._next_step += 1
        return PlannedStep(plan, slots_R, self.running.ticket_S[slots_R], num_tokens_R, ends_R, samples_R)

    def _sampled_tokens(self, slots_R: Slots) -> tuple[Ints, Ints]:
        """What a plan tells a pipeline's first stage: slots whose next token was sampled, and these tokens."""
        if not self._is_pipelined:
            return b"", b""
        sampled_R, tokens_R = self.running.next_sampled(slots_R)
        return sampled_R.astype(np.int32).tobytes(), tokens_R.tobytes()

    def _fail_without_token(self, step: PlannedStep, tokens_S: NDArray[np.int32]) -> list[int]:
        """End the requests that no token could be chosen for; gives their ids. The others go on."""
        slots_S, tickets_S = step.slots_R[step.samples_R], step.tickets_R[step.samples_R]
        is_failed_S = (tokens_S == NO_TOKEN) & (self.running.ticket_S[slots_S] == tickets_S)
        failed = [self._vacate(slot).request_id for slot in slots_S[is_failed_S].tolist()]
        for request_id in failed:
            del self._requests[request_id]
        return failed

    def _note_first_tokens(self, slots_S: Slots, lengths_S: Counts) -> tuple[tuple[int, int], ...]:
        """Id and number of cached tokens of each request that has its first token now."""
        is_first_S = lengths_S == self.running.num_prompt_S[slots_S] + 1
        requests = [self.running.request(slot) for slot in slots_S[is_first_S].tolist()]
        cached = tuple((request.request_id, request.num_cached or 0) for request in requests)
        self.totals.num_prompt_tokens += sum(request.num_prompt for request in requests)
        self.totals.num_cached_tokens += sum(num_cached for _, num_cached in cached)
        return cached

    def _finish(
        self, slots_S: Slots, tokens_S: NDArray[np.int32], lengths_S: Counts
    ) -> tuple[tuple[int, FinishReason], ...]:
        """End the requests whose newest token is their last; gives their ids and why."""
        running = self.running
        is_end_S = (running.end_token_ids_SE[slots_S] == tokens_S[:, None]).any(axis=1)
        is_stop_S = is_end_S & (lengths_S > running.min_len_S[slots_S])
        is_full_S = lengths_S >= running.max_len_S[slots_S]
        finished = []
        for sample in np.flatnonzero(is_stop_S | is_full_S).tolist():
            request = self._vacate(int(slots_S[sample]))
            del self._requests[request.request_id]
            finished.append((request.request_id, FinishReason.STOP if is_stop_S[sample] else FinishReason.LENGTH))
        return tuple(finished)


def _rows(decoding_R: Slots, chunks: list[tuple[int, int]]) -> tuple[Slots, Counts]:
    """Slots and numbers of tokens, rows with one token first."""
    num_tokens_R = np.ones(len(decoding_R), dtype=np.int64)
    if not chunks:
        return decoding_R, num_tokens_R
    chunk_slots, chunk_tokens = np.array(chunks, dtype=np.int64).T
    slots_R = np.concatenate([decoding_R, chunk_slots])
    num_tokens_R = np.concatenate([num_tokens_R, chunk_tokens])
    order = np.argsort(num_tokens_R > 1, kind="stable")
    return slots_R[order], num_tokens_R[order]


def _keep_entries(columns: LogprobColumns | None, is_kept_S: NDArray[np.bool_]) -> LogprobColumns | None:
    """Log-probabilities of the samples that are kept, by their new places."""
    if columns is None or is_kept_S.all():
        return columns
    entries = as_ints(columns.entries)
    is_kept_E = is_kept_S[entries]
    if not is_kept_E.any():
        return None
    places_S = np.cumsum(is_kept_S) - 1
    shape = (len(entries), columns.width)
    return LogprobColumns(
        entries=ints(places_S[entries[is_kept_E]]),
        chosen=as_floats(columns.chosen)[is_kept_E].tobytes(),
        width=columns.width,
        top_ids=as_ints(columns.top_ids).reshape(shape)[is_kept_E].tobytes(),
        top_logprobs=as_floats(columns.top_logprobs).reshape(shape)[is_kept_E].tobytes(),
    )
