"""Which tokens of which requests the next step computes, and what follows from its outcome.

A pure core: no processes, no clock. Continuous batching (Orca, OSDI 2022) over a paged KV cache (vLLM, SOSP 2023) with
chunked prefill (Sarathi-Serve, OSDI 2024). Plans may run ahead of outcomes: a row in flight counts as one token longer.

The ranks of all replicas meet in the collectives of their experts, so that a step is one for all of them: a replica
without work takes part with nothing to compute. Each has its own queue and blocks, and what it does is what it would do
alone; but what happens to the requests that run happens to those of all replicas at once, and single replicas are
looked at only where something is given out or changes.

Shape suffixes: P replicas; R rows of a step; S rows of it that sample; B blocks of a request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.engine.block_pool import Blocks
from phalanx.engine.late_writes import LateWrites
from phalanx.engine.logprobs import keep, merge
from phalanx.engine.pace import AheadLimits, StepTokens
from phalanx.engine.prefix_cache import ROOT, block_digest
from phalanx.engine.replica import Replica
from phalanx.engine.request import Counts, Request, Running, Slots
from phalanx.engine.router import choose
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.columns import LogprobColumns, as_ints, ints
from phalanx.protocol.sampling import FinishReason
from phalanx.protocol.worker import FIRST_EPOCH, NO_TOKEN, CopyBlocks, Step, StepPlan, StepResult, StepShape


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step and what its commit needs to know of it."""

    step: Step
    slots_R: Slots
    tickets_R: Counts
    num_tokens_R: Counts
    ends_R: Counts
    """Tokens of each sequence that are in the KV cache after the step."""
    samples_R: NDArray[np.bool_]
    tokens: StepTokens


class Totals:
    """Counts since the start, of each replica."""

    def __init__(self, num_replicas: int, before: Totals | None = None) -> None:
        """Those of `before` go on. A replica that is gone leaves its own to the next one with its number."""
        self.num_steps: int = 0 if before is None else before.num_steps
        earlier_P = np.zeros((4, 0), dtype=np.int64) if before is None else before._counts_P
        num_missing = max(num_replicas - earlier_P.shape[1], 0)
        self._counts_P: Counts = np.pad(earlier_P, ((0, 0), (0, num_missing)))
        (
            self.num_preemptions_P,
            self.num_prompt_tokens_P,
            self.num_cached_tokens_P,
            self.num_generated_tokens_P,
        ) = self._counts_P[:, :num_replicas]


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
        num_replicas: int = 1,
        epoch: int = FIRST_EPOCH,
    ) -> None:
        """The limits and `num_blocks` are those of each replica."""
        assert is_pipelined or num_micro_batches == 1, num_micro_batches
        assert max_num_batched_tokens >= max_num_seqs, "every running request must find room in a step"
        self.totals = Totals(num_replicas)
        self.replicas = tuple(
            Replica(index, num_blocks=num_blocks, block_size=block_size, is_prefix_caching=is_prefix_caching)
            for index in range(num_replicas)
        )
        self.running = Running(
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size, num_replicas=num_replicas
        )
        self._requests: dict[int, Request] = {}
        self._max_num_batched_tokens = max_num_batched_tokens
        self._block_size = block_size
        self._is_prefix_caching = is_prefix_caching
        self._eos_token_ids = eos_token_ids
        self._is_pipelined = is_pipelined
        self._num_micro_batches = num_micro_batches
        self._first_cached_ticket = 0
        """Who came in before does not fill the prefix cache: some of its keys and values are from before a reset."""
        self._epoch = epoch
        self._next_step = 0
        self._under_way: deque[PlannedStep] = deque()
        self._late_writes = LateWrites(self.replicas, self.running)
        self._admits_until: int | None = None
        """Who arrived later waits; None if nobody does."""
        self._alone: int | None = None
        """The one request that may run, if the others are held back."""
        self._aside: int | None = None
        """The one that is held back, if the others may run."""

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def add(self, request: Request) -> None:
        """Queue a request with the replica that suits it best.

        Its pool must be able to hold the request when it is alone, or it would wait for ever.
        """
        assert request.request_id not in self._requests
        cached = [len(replica.find_cached(request)) * self._block_size for replica in self.replicas]
        loads = [len(replica.waiting) + self.running.num_in(replica.index) for replica in self.replicas]
        request.replica = choose(cached, loads)
        replica = self.replicas[request.replica]
        assert self._num_blocks(request.max_len - 1) <= replica.pool.num_blocks
        self._requests[request.request_id] = request
        replica.waiting[request.request_id] = request

    def cancel(self, request_ids: Iterable[int]) -> list[int]:
        """Forget requests, whatever they are doing; gives the ids of those that had not ended."""
        cancelled = []
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            if request.slot is None:
                del self.replicas[request.replica].waiting[request_id]
            else:
                self._vacate(request.slot)
            cancelled.append(request_id)
        return cancelled

    def reset_prefix_cache(self) -> None:
        """Let no request that comes in from now on find what was computed, or depends on what was computed, until now.

        Those that run go on with what they have. One that gives way computes all its tokens anew.
        """
        for replica in self.replicas:
            replica.pool.reset_cache()
        self._first_cached_ticket = self.running.next_ticket

    def recompute(self) -> None:
        """Have all requests wait again, in order of arrival, and no block hold anything. No step is under way."""
        assert not self._under_way
        self._requeue(self.running.occupied())
        for replica in self.replicas:
            replica.pool.reset_cache()

    def admit_until(self, arrival: int | None) -> None:
        """Let requests wait that arrive as this one or later; with None nobody has to."""
        self._admits_until = arrival

    def has_admitted(self) -> bool:
        """Whether a request is left that need not wait for `admit_until`."""
        first = next(iter(self._requests.values()), None)  # they are in order of arrival
        return first is not None and self._is_admitted(first)

    def under_way(self) -> dict[int, int]:
        """The requests that steps under way compute for; by id, to how many tokens in the KV cache they bring each."""
        return {request_id: end for step in self._under_way for request_id, end in self.reach(step).items()}

    def reach(self, step: PlannedStep) -> dict[int, int]:
        """Of a step that is not committed: by request, how many tokens are in the KV cache after it."""
        rows = self._live(step).nonzero()[0]
        request_ids_R = self.running.request_id_S[step.slots_R[rows]]
        return dict(zip(request_ids_R.tolist(), step.ends_R[rows].tolist(), strict=True))

    def rewind(self, epoch: int, *, keeps_cache: bool, sets_aside: bool = False) -> bool:
        """Forget the steps under way, and go on from what is committed with workers that know nothing.

        Those before them must have ended, but with `sets_aside`: then blocks that they may still write to are set aside
        until `restore_blocks`, requests have other ones, and `copies` says what these are to hold. False if there are
        too few blocks for that: then nothing was set aside, and whoever writes late must be gone before the next step.

        `keeps_cache`: these find the KV cache as the workers before them left it. Then every running request keeps its
        slot and its blocks, and the next plan brings them all, each with what committed steps have computed for it.
        Otherwise all wait again, in order of arrival, and no block holds anything.
        """
        self._epoch = epoch
        slots: set[int] = set()
        for step in self._under_way:
            is_live_R = self._live(step)
            self.running.take_back(step.slots_R[is_live_R], step.num_tokens_R[is_live_R])
            slots.update(step.slots_R[is_live_R].tolist())
        self._under_way.clear()
        if not keeps_cache:
            self._late_writes.forget_copies()
        may_go_on = not sets_aside or not keeps_cache or self._late_writes.set_aside(slots)
        self._late_writes.nobody_writes()
        if not keeps_cache:
            self._requeue(self.running.occupied())
            for replica in self.replicas:
                replica.pool.reset_cache()
        for replica in self.replicas:
            replica.tell_nothing()
        self.running.begin_with_committed()
        for slot in self.running.occupied():
            self._introduce(slot)
        return may_go_on

    @property
    def copies(self) -> tuple[CopyBlocks, ...]:
        """What the workers are to do in turn after a rewind, before the next step."""
        return self._late_writes.copies

    @property
    def has_set_aside(self) -> bool:
        """Whether blocks are set aside, and so come back."""
        return self._late_writes.num_aside > 0

    def restore_blocks(self) -> bool:
        """Who might have written late is gone. False if it is too early, and to be called again after a commit."""
        return self._late_writes.restore()

    def dismiss(self) -> list[Request]:
        """All requests in order of arrival, with their committed tokens, for a scheduler that comes after this one."""
        self._requeue(self.running.occupied())
        return sorted(self._requests.values(), key=lambda request: request.arrival)

    def tokens_of_running(self) -> list[NDArray[np.int32]]:
        """The committed tokens of each request that runs."""
        running = self.running
        return [running.token_ids_SL[slot, : running.num_committed_S[slot]].copy() for slot in running.occupied()]

    def go_on_after(self, before: Scheduler) -> None:
        """Go on with the totals of a scheduler that plans no more, and with its step numbers if this has none yet.

        Who has to wait there waits here too.
        """
        self.totals = Totals(len(self.replicas), before.totals)
        self._next_step = self._next_step or before._next_step
        self._admits_until = before._admits_until

    def hold_back(self, *, all_but: int | None, aside: int | None) -> None:
        """From the next plan on only request `all_but` runs, or else all but `aside`; the others wait. None: nobody."""
        self._alone, self._aside = all_but, aside
        if all_but is not None or aside is not None:
            self._requeue(
                slot for slot in self.running.occupied() if not self._may_run(self.running.request(slot).request_id)
            )

    def _may_run(self, request_id: int) -> bool:
        return request_id == self._alone if self._alone is not None else request_id != self._aside

    def plan(self, limits: AheadLimits | None = None) -> PlannedStep | None:
        """The next step, or None if there is nothing to compute before an earlier step is committed.

        In each replica first one token of every sequence that decodes, then the prompts that are under way, then
        requests that wait, in order of arrival, each with as much of its prompt as fits. When blocks run out, the last
        to arrive gives way. Rehearsals, which nobody waits for, have no more tokens than `limits` says.
        """
        decoding_R, growing_R, new_blocks_R = self._find_room_for_decoding()

        chunks: list[tuple[int, int]] = []
        most_ahead = self._most_ahead(limits, is_beside=bool(len(decoding_R) or self._under_way))
        prefilling_R = self.running.prefilling()
        for replica, decoding, prefilling in zip(
            self.replicas, self.running.segments(decoding_R), self.running.segments(prefilling_R), strict=True
        ):
            if replica.waiting or prefilling.start < prefilling.stop:
                budget = self._max_num_batched_tokens - (decoding.stop - decoding.start)
                chunks += self._plan_prompts(replica, prefilling_R[prefilling].tolist(), budget, most_ahead)

        slots_R, num_tokens_R = self._rows(decoding_R, chunks)
        if not len(slots_R):
            return None
        tokens = self._tokens(len(decoding_R), chunks)
        return self._planned(slots_R, num_tokens_R, growing_R, new_blocks_R, tokens)

    def commit(self, step: PlannedStep, results: Sequence[StepResult]) -> TokenBatch:
        """Take in what a step made; gives the tokens that may leave now and the requests that they end."""
        tokens_S, logprobs = _outcome(step.step, results)
        oldest = self._under_way.popleft()
        assert step is oldest, f"step {step.step.number} is committed before step {oldest.step.number}"
        self._late_writes.committed(step.step.number)
        failed = self._fail_without_token(step, tokens_S)
        is_live_R = self._live(step)
        if self._is_prefix_caching:
            self._cache_filled_blocks(step, is_live_R)
        is_live_S = is_live_R[step.samples_R]
        slots_S, tokens_S = step.slots_R[step.samples_R][is_live_S], tokens_S[is_live_S]
        lengths_S = self.running.append_tokens(slots_S, tokens_S)
        request_ids_S = self.running.request_id_S[slots_S]
        self.totals.num_steps += 1
        self.totals.num_generated_tokens_P += self.running.counts(slots_S)
        cached = self._note_first_tokens(slots_S, lengths_S)
        return TokenBatch(
            request_ids=request_ids_S.tobytes(),
            tokens=ints(tokens_S),
            finished=self._finish(slots_S, tokens_S, lengths_S) + tuple((i, FinishReason.ERROR) for i in failed),
            logprobs=keep(logprobs, is_live_S),
            errors=tuple((i, "the model gave logits that no token can be chosen from") for i in failed),
            cached=cached,
        )

    # ---------------------------------------------------------------------------- room

    def _find_room_for_decoding(self) -> tuple[Slots, Slots, Blocks]:
        """Who decodes in this step, and who of them is given one more block, and which."""
        running = self.running
        while True:
            decoding_R = self._decoding()
            growing_R = running.without_room(decoding_R)
            growing = self._by_replica(growing_R)
            short = [(replica, own_R) for replica, own_R in growing if len(own_R) > replica.pool.num_free]
            giving_way = [replica for replica, _ in short if not running.any_ending(replica.index)]
            if not giving_way or self._blocks_come_back:
                break
            for replica in giving_way:
                self._preempt(running.last_arrived(replica.index))
        if short:  # blocks come back with a step that is under way: pausing is cheaper
            paused_R = np.concatenate([own_R[replica.pool.num_free :] for replica, own_R in short])
            decoding_R = np.setdiff1d(decoding_R, paused_R, assume_unique=True)
            growing_R = np.setdiff1d(growing_R, paused_R, assume_unique=True)
            growing = self._by_replica(growing_R)
        if not growing:
            return decoding_R, growing_R, np.empty(0, dtype=np.int32)
        blocks_R = np.concatenate([replica.pool.take(len(own_R)) for replica, own_R in growing])
        running.append_blocks(growing_R, blocks_R)
        return decoding_R, growing_R, blocks_R

    @property
    def _blocks_come_back(self) -> bool:
        """Whether some are set aside, and nobody has to give way first for a step to be committed."""
        return self.has_set_aside and bool(self._under_way or not self.copies)

    def _decoding(self) -> Slots:
        """Who may decode in this step."""
        decoding_R = self.running.decoding()
        if not self._is_pipelined:
            return decoding_R
        return self.running.longest_idle(decoding_R, self._num_micro_batches)

    def _plan_prompts(
        self, replica: Replica, prefilling: list[int], budget: int, most_ahead: int
    ) -> list[tuple[int, int]]:
        """Slots and numbers of tokens, `budget` in all and `most_ahead` of rehearsals: of prompts that are under way,
        then of requests that wait.
        """
        chunks: list[tuple[int, int]] = []
        under_way = iter(prefilling)
        while budget:
            slot = next(under_way, None)
            if slot is None and replica.waiting:
                slot = self._admit_next(replica)
            if slot is None:
                break
            num_tokens = min(self.running.num_missing(slot), budget)
            if self.running.request(slot).is_rehearsal:
                num_tokens = min(num_tokens, most_ahead)
                most_ahead -= num_tokens
            if num_tokens:
                chunks.append((slot, num_tokens))
                budget -= num_tokens
        return chunks

    def _most_ahead(self, limits: AheadLimits | None, *, is_beside: bool) -> int:
        """Tokens of rehearsals in the next step. Alone there are some, or none would ever be."""
        if limits is None:
            return self._max_num_batched_tokens
        return limits.beside if is_beside else limits.alone

    def _admit_next(self, replica: Replica) -> int | None:
        """Give the request that has waited longest a slot and blocks for all its tokens; None if there is no room.

        Those that are held back are passed over.
        """
        running, pool = self.running, replica.pool
        if not running.has_free_slot(replica.index):
            return None
        admitted = (one for one in replica.waiting.values() if self._is_admitted(one))
        request = next((one for one in admitted if self._may_run(one.request_id)), None)
        if request is None:
            return None
        found_B = replica.find_cached(request)
        num_missing = self._num_blocks(len(request.token_ids)) - len(found_B)
        # Everyone that runs soon needs its next block: without these to spare, who comes in now would give way at once.
        num_spare = running.num_in(replica.index)
        if num_missing + pool.num_idle(found_B) + num_spare > pool.num_free:
            return None
        pool.share(found_B)
        tail_B, num_more = replica.take_tail(request, len(found_B))
        blocks_B = np.concatenate([found_B, tail_B, pool.take(num_missing - len(tail_B))])
        num_computed = len(found_B) * self._block_size + num_more
        if request.num_cached is None:
            request.num_cached = num_computed
        del replica.waiting[request.request_id]
        slot = running.add(request, blocks_B, num_computed)
        self._introduce(slot)
        return slot

    def _is_admitted(self, request: Request) -> bool:
        return self._admits_until is None or request.arrival < self._admits_until

    def _introduce(self, slot: int) -> None:
        replica = self.replicas[self.running.request(slot).replica]
        replica.tell_new(self.running.describe(slot, self._eos_token_ids))

    def _preempt(self, slot: int) -> None:
        """Back to the front of the queue. What is under way for it is lost: it is computed again with the rest."""
        request = self._vacate(slot)
        replica = self.replicas[request.replica]
        replica.waiting[request.request_id] = request
        replica.waiting.move_to_end(request.request_id, last=False)
        self.totals.num_preemptions_P[request.replica] += 1

    def _requeue(self, slots: Iterable[int]) -> None:
        """Back to the queues, without a lack of memory: each to its place in the order of arrival."""
        requests = [self._vacate(slot) for slot in slots]
        for replica in self.replicas if requests else ():
            replica.requeue(request for request in requests if request.replica == replica.index)

    def _vacate(self, slot: int) -> Request:
        ticket = self.running.ticket_S[slot]
        request, blocks_B = self.running.remove(slot)
        replica = self.replicas[request.replica]
        for step in reversed(self._under_way):
            if ((step.slots_R == slot) & (step.tickets_R == ticket)).any():
                self._late_writes.leave(step.step.number, replica, blocks_B)
                break
        replica.pool.release(blocks_B)
        replica.tell_dropped(int(self.running.worker_slot_S[slot]))
        return request

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _by_replica(self, slots_R: Slots) -> list[tuple[Replica, Slots]]:
        """The replicas that have some of these slots, each with its own."""
        segments = zip(self.replicas, self.running.segments(slots_R), strict=True)
        return [(replica, slots_R[own]) for replica, own in segments if own.start < own.stop]

    # ---------------------------------------------------------------------------- plan and outcome

    def _rows(self, decoding_R: Slots, chunks: list[tuple[int, int]]) -> tuple[Slots, Counts]:
        """Slots and numbers of tokens; in each replica rows with one token first."""
        num_tokens_R = np.ones(len(decoding_R), dtype=np.int64)
        if not chunks:
            return decoding_R, num_tokens_R
        chunk_slots, chunk_tokens = np.array(chunks, dtype=np.int64).T
        slots_R = np.concatenate([decoding_R, chunk_slots])
        num_tokens_R = np.concatenate([num_tokens_R, chunk_tokens])
        order = np.lexsort((num_tokens_R > 1, self.running.replica_S[slots_R]))
        return slots_R[order], num_tokens_R[order]

    def _tokens(self, num_decoding: int, chunks: list[tuple[int, int]]) -> StepTokens:
        num_ahead = sum(num_tokens for slot, num_tokens in chunks if self.running.request(slot).is_rehearsal)
        num_of_prompts = sum(num_tokens for _, num_tokens in chunks) - num_ahead
        return StepTokens(num_decoding, num_of_prompts, num_ahead)

    def _planned(
        self, slots_R: Slots, num_tokens_R: Counts, growing_R: Slots, blocks_R: Blocks, tokens: StepTokens
    ) -> PlannedStep:
        running = self.running
        # A pipeline's first stage is told the tokens that were sampled.
        told_R, tokens_R = running.next_sampled(slots_R) if self._is_pipelined else (slots_R[:0], blocks_R[:0])
        ends_R, samples_R = running.advance(slots_R, num_tokens_R, self._next_step)
        worker_slot_S = running.worker_slot_S
        counts_R = num_tokens_R.astype(np.int32)
        plans = tuple(
            StepPlan(
                epoch=self._epoch,
                step=self._next_step,
                shape=StepShape(num_tokens, rows.stop - rows.start, int(np.count_nonzero(samples_R[rows]))),
                slots=worker_slot_S[slots_R[rows]].tobytes(),
                num_tokens=counts_R[rows].tobytes(),
                block_slots=worker_slot_S[growing_R[growing]].tobytes(),
                block_ids=blocks_R[growing].tobytes(),
                dropped=replica.take_dropped(),
                new=replica.take_new(),
                token_slots=worker_slot_S[told_R[told]].tobytes(),
                tokens=tokens_R[told].tobytes(),
            )
            for replica, num_tokens, rows, growing, told in zip(
                self.replicas,
                running.sums(slots_R, num_tokens_R),
                running.segments(slots_R),
                running.segments(growing_R),
                running.segments(told_R),
                strict=True,
            )
        )
        self._next_step += 1
        planned = PlannedStep(Step(plans), slots_R, running.ticket_S[slots_R], num_tokens_R, ends_R, samples_R, tokens)
        self._under_way.append(planned)
        return planned

    def _live(self, step: PlannedStep) -> NDArray[np.bool_]:
        """Its rows that count: not those whose request ended, was cancelled or gave way after the step was planned."""
        is_live_R: NDArray[np.bool_] = self.running.ticket_S[step.slots_R] == step.tickets_R
        return is_live_R

    def _fail_without_token(self, step: PlannedStep, tokens_S: NDArray[np.int32]) -> list[int]:
        """End the requests that no token could be chosen for; gives their ids. The others go on."""
        samples = (tokens_S == NO_TOKEN).nonzero()[0]
        if not len(samples):
            return []
        slots_S, tickets_S = step.slots_R[step.samples_R][samples], step.tickets_R[step.samples_R][samples]
        is_live_S = self.running.ticket_S[slots_S] == tickets_S
        failed = [self._vacate(slot).request_id for slot in slots_S[is_live_S].tolist()]
        for request_id in failed:
            del self._requests[request_id]
        return failed

    def _cache_filled_blocks(self, step: PlannedStep, is_live_R: NDArray[np.bool_]) -> None:
        """Let blocks be found that the step has filled."""
        running = self.running
        firsts_R, ends_R = (step.ends_R - step.num_tokens_R) // self._block_size, step.ends_R // self._block_size
        rows = (is_live_R & (firsts_R < ends_R) & (step.tickets_R >= self._first_cached_ticket)).nonzero()[0]
        for slot, first, end in zip(
            step.slots_R[rows].tolist(), firsts_R[rows].tolist(), ends_R[rows].tolist(), strict=True
        ):
            request = running.request(slot)
            digests, cache = request.digests, self.replicas[request.replica].cache
            for place in range(first, end):
                if place == len(digests):
                    content = running.token_ids_SBO[slot, place].tobytes()
                    digests.append(block_digest(digests[-1] if digests else ROOT, content))
                cache.insert(digests[place], int(running.block_ids_SB[slot, place]))

    def _note_first_tokens(self, slots_S: Slots, lengths_S: Counts) -> tuple[tuple[int, int], ...]:
        """Id and number of cached tokens of each request that has its first token now."""
        is_first_S = lengths_S == self.running.num_prompt_S[slots_S] + 1
        requests = [self.running.request(slot) for slot in slots_S[is_first_S].tolist()]
        for request in requests:
            if request.is_rehearsal:  # and this is its only token
                self.totals.num_generated_tokens_P[request.replica] -= 1
                continue
            self.totals.num_prompt_tokens_P[request.replica] += request.num_prompt
            self.totals.num_cached_tokens_P[request.replica] += request.num_cached or 0
        return tuple((request.request_id, request.num_cached or 0) for request in requests)

    def _keep_tail(self, slot: int) -> None:
        """Of a rehearsal, so that who comes after it has nothing of it to compute."""
        running, request = self.running, self.running.request(slot)
        if request.is_rehearsal and running.ticket_S[slot] >= self._first_cached_ticket:
            computed = running.token_ids_SL[slot, : request.num_prompt]
            self.replicas[request.replica].keep_tail(request, computed, running.block_ids_SB[slot])

    def _finish(
        self, slots_S: Slots, tokens_S: NDArray[np.int32], lengths_S: Counts
    ) -> tuple[tuple[int, FinishReason], ...]:
        """End the requests whose newest token is their last; gives their ids and why."""
        running = self.running
        is_end_S = (running.end_token_ids_SE[slots_S] == tokens_S[:, None]).any(axis=1)
        is_stop_S = is_end_S & (lengths_S > running.min_len_S[slots_S])
        is_full_S = lengths_S >= running.max_len_S[slots_S]
        finished = []
        for sample in (is_stop_S | is_full_S).nonzero()[0].tolist():
            self._keep_tail(int(slots_S[sample]))
            request = self._vacate(int(slots_S[sample]))
            del self._requests[request.request_id]
            finished.append((request.request_id, FinishReason.STOP if is_stop_S[sample] else FinishReason.LENGTH))
        return tuple(finished)


def _outcome(step: Step, results: Sequence[StepResult]) -> tuple[NDArray[np.int32], LogprobColumns | None]:
    """What all replicas sampled, one after the other."""
    tokens = [as_ints(result.tokens) for result in results]
    for plan, result, sampled in zip(step.plans, results, tokens, strict=True):
        assert result.step == plan.step, f"step {plan.step} was answered as step {result.step}"
        assert len(sampled) == plan.shape.num_samples
    return np.concatenate(tokens), merge([result.logprobs for result in results], list(map(len, tokens)))
