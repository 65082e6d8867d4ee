"""Workers without a model: they follow StepPlan's contract to the letter and check that the brain does.

The "model" is a hash. What it keeps in the KV cache for a token is the hash of all tokens up to it, and the next token
follows from that hash and the request's seed. So outputs can be told beforehand (`expected_output`), and every step can
check that the cache still holds what each sequence needs: a block that somebody else wrote to is found at once.

Shape suffixes: S all slots, R rows of a step, L tokens of the longest sequence, B blocks, O offsets in a block,
T tokens of several rows, D samples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from phalanx.protocol.columns import LogprobColumns, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH, BlockCopies, Call, NewRequest, Step, StepPlan, StepResult

Hashes = NDArray[np.uint64]
Slots = NDArray[np.intp]
Counts = NDArray[np.int64]
Places = NDArray[np.int64]

_BITS = 2**64
_START = 0x9E3779B97F4A7C15
_FACTOR = 0xD6E8FEB86659FD93

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Call).decode


class SimulatedWorker:
    """One rank, or all stages of a pipeline. `run` raises AssertionError for every breach of the contract."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int = 50,
        num_stages: int = 1,
        epoch: int = FIRST_EPOCH,
        cells_BO: Hashes | None = None,
    ) -> None:
        """`cells_BO`: the KV cache of a worker before it, which is gone."""
        self.epoch = epoch
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.cells_BO: Hashes = np.zeros((num_blocks, block_size), dtype=np.uint64) if cells_BO is None else cells_BO
        """The KV cache: for each place the hash of the tokens up to the one that is stored there."""
        self.written: tuple[Places, Places] = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        """Blocks and offsets of the cells that the last step has written."""
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._is_pipelined = num_stages > 1
        self._next_step: int | None = None
        self._num_holders_B = np.zeros(num_blocks, dtype=np.int64)
        self._requests: dict[int, NewRequest] = {}
        # What the cells of a slot's blocks must hold, by position.
        self._hashes_SL: Hashes = np.zeros((max_num_seqs, max_model_len), dtype=np.uint64)
        self._newest_S = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_given_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_known_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_computed_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_blocks_S = np.zeros(max_num_seqs, dtype=np.int64)
        self._seed_S: Hashes = np.zeros(max_num_seqs, dtype=np.uint64)
        self._block_ids_SB = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)

    def run(self, plan: StepPlan) -> StepResult:
        """Carry out one step."""
        assert plan.epoch == self.epoch, f"a plan of epoch {plan.epoch}"
        assert self._next_step in (None, plan.step), f"step {plan.step} comes where step {self._next_step} is due"
        is_first, self._next_step = self._next_step is None, plan.step + 1
        for slot in as_ints(plan.dropped).tolist():
            self._drop(slot)
        for request in plan.new:
            self._admit(request, is_first)
        for slot, block in zip(as_ints(plan.block_slots).tolist(), as_ints(plan.block_ids).tolist(), strict=True):
            self._append_block(slot, block)
        return self._compute(plan)

    def copy_blocks(self, copies: BlockCopies) -> None:
        """Have blocks of the cache hold what others hold."""
        sources, targets = as_ints(copies.sources), as_ints(copies.targets)
        assert not np.isin(sources, targets).any(), "a block is read and written"
        self.cells_BO[targets] = self.cells_BO[sources]

    def rows(self, plan: StepPlan) -> list[tuple[SamplingParams, int]]:
        """Of a step that it has run: what each row's request asked for, and how many of its tokens are computed."""
        slots = as_ints(plan.slots).tolist()
        return [(self._requests[slot].sampling, int(self._num_computed_S[slot])) for slot in slots]

    def _drop(self, slot: int) -> None:
        del self._requests[slot]
        self._num_holders_B[self._block_ids_SB[slot, : self._num_blocks_S[slot]]] -= 1

    def _admit(self, request: NewRequest, is_first: bool) -> None:
        """The first plan also brings requests that workers before this one were in the midst of."""
        slot, token_ids = request.slot, as_ints(request.token_ids).tolist()
        assert slot not in self._requests, f"slot {slot} is given twice"
        assert request.num_computed < len(token_ids), "the last token's logits are wanted"
        assert 0 < request.num_prompt <= len(token_ids)
        self._requests[slot] = request
        self._hashes_SL[slot, : len(token_ids)] = token_hashes(token_ids)
        self._num_given_S[slot] = self._num_known_S[slot] = len(token_ids)
        self._num_computed_S[slot] = request.num_computed
        self._seed_S[slot] = _effective_seed(request.sampling, request.seed)
        self._num_blocks_S[slot] = 0
        for block in as_ints(request.blocks).tolist():
            self._append_block(slot, block)
        place, num_in_block = divmod(request.num_computed, self.block_size)
        if num_in_block and not is_first:
            block = self._block_ids_SB[slot, place]
            assert self._num_holders_B[block] == 1, "a shared block would be written"

    def _append_block(self, slot: int, block: int) -> None:
        assert slot in self._requests, f"a block for slot {slot}, which is free"
        blocks = self._block_ids_SB[slot, : self._num_blocks_S[slot]]
        assert block not in blocks, f"slot {slot} has block {block} twice"
        self._block_ids_SB[slot, len(blocks)] = block
        self._num_blocks_S[slot] += 1
        self._num_holders_B[block] += 1

    def _compute(self, plan: StepPlan) -> StepResult:
        slots_R, num_tokens_R = as_ints(plan.slots).astype(np.intp), as_ints(plan.num_tokens).astype(np.int64)
        starts_R = self._num_computed_S[slots_R]
        ends_R = starts_R + num_tokens_R
        samples_R = ends_R == self._num_known_S[slots_R]
        self._check_rows(plan, slots_R, num_tokens_R, ends_R, samples_R)
        self._check_tokens(plan, slots_R[starts_R >= self._num_given_S[slots_R]])
        self._write(slots_R, starts_R, num_tokens_R)
        self._check_contexts(slots_R, ends_R)
        self._num_computed_S[slots_R] = ends_R
        return self._sample(plan.step, slots_R[samples_R])

    def _check_rows(
        self,
        plan: StepPlan,
        slots_R: Slots,
        num_tokens_R: Counts,
        ends_R: Counts,
        samples_R: NDArray[np.bool_],
    ) -> None:
        shape = plan.shape
        assert len(slots_R) == len(num_tokens_R) == shape.num_rows
        assert len(np.unique(slots_R)) == len(slots_R), "two rows of one slot"
        assert self._requests.keys() >= set(slots_R.tolist()), "a row of a free slot"
        assert int(num_tokens_R.sum()) == shape.num_tokens <= self._max_num_batched_tokens
        assert int(samples_R.sum()) == shape.num_samples
        assert (num_tokens_R > 0).all(), "a row without tokens"
        assert (np.diff((num_tokens_R > 1).astype(np.int8)) >= 0).all(), "rows with one token come first"
        assert (ends_R <= self._num_known_S[slots_R]).all(), "tokens are computed that nobody knows"
        assert (ends_R <= self._num_blocks_S[slots_R] * self.block_size).all(), "too few blocks"

    def _check_tokens(self, plan: StepPlan, sampled_R: Slots) -> None:
        """A pipeline's first stage knows of sampled tokens only what the plan says."""
        expected_R = sampled_R if self._is_pipelined else sampled_R[:0]
        assert as_ints(plan.token_slots).tolist() == expected_R.tolist(), "the wrong rows are told their tokens"
        assert (as_ints(plan.tokens) == self._newest_S[expected_R]).all(), "a row is told a token that is not its own"

    def _write(self, slots_R: Slots, starts_R: Counts, num_tokens_R: Counts) -> None:
        slots_T, positions_T = _flatten(slots_R, starts_R, num_tokens_R)
        blocks_T = self._block_ids_SB[slots_T, positions_T // self.block_size]
        assert (self._num_holders_B[blocks_T] == 1).all(), "a block is written that another request holds"
        self.written = blocks_T, positions_T % self.block_size
        self.cells_BO[self.written] = self._hashes_SL[slots_T, positions_T]

    def _check_contexts(self, slots_R: Slots, ends_R: Counts) -> None:
        slots_T, positions_T = _flatten(slots_R, np.zeros_like(ends_R), ends_R)
        blocks_T = self._block_ids_SB[slots_T, positions_T // self.block_size]
        found_T = self.cells_BO[blocks_T, positions_T % self.block_size]
        wrong = np.flatnonzero(found_T != self._hashes_SL[slots_T, positions_T])
        assert not len(wrong), f"slot {slots_T[wrong[0]]} finds other keys at position {positions_T[wrong[0]]}"

    def _sample(self, step: int, slots_D: Slots) -> StepResult:
        lengths_D = self._num_known_S[slots_D]
        assert (lengths_D < self._max_model_len).all(), "a sequence too long"
        last_D = self._hashes_SL[slots_D, lengths_D - 1]
        tokens_D = (_mix(last_D ^ self._seed_S[slots_D]) % np.uint64(self.vocab_size)).astype(np.int32)
        for i, slot in enumerate(slots_D.tolist()):
            request = self._requests[slot]
            num_output = int(lengths_D[i]) - request.num_prompt
            assert request.sampling.max_tokens is None or num_output < request.sampling.max_tokens, "an output too long"
            if num_output < request.sampling.min_tokens:
                ends = _end_token_ids(request.sampling, request.eos_token_ids)
                tokens_D[i] = _next_but(int(tokens_D[i]), ends, self.vocab_size)
        self._hashes_SL[slots_D, lengths_D] = _chain(last_D, tokens_D.astype(np.uint64))
        self._num_known_S[slots_D] = lengths_D + 1
        self._newest_S[slots_D] = tokens_D
        return StepResult(step, ints(tokens_D), self._logprobs(slots_D, tokens_D))

    def _logprobs(self, slots_D: Slots, tokens_D: NDArray[np.int32]) -> LogprobColumns | None:
        """Made up from the tokens, for the slots that asked: see `expected_logprob`."""
        asked = [self._requests[slot].sampling.logprobs for slot in slots_D.tolist()]
        entries = [i for i, count in enumerate(asked) if count is not None]
        if not entries:
            return None
        width = max(count for count in asked if count is not None)
        top_ids = (tokens_D[entries][:, None] + np.arange(width)).astype(np.int32)
        return LogprobColumns(
            entries=ints(entries),
            chosen=expected_logprob(tokens_D[entries]).tobytes(),
            width=width,
            top_ids=ints(top_ids),
            top_logprobs=expected_logprob(top_ids).tobytes(),
        )


class Answered:
    """The answer of a call that has been carried out."""

    def __init__(self, results: tuple[StepResult, ...]) -> None:
        self._results = results

    def done(self) -> bool:
        return True

    def result(self) -> tuple[StepResult, ...]:
        return self._results


class SimulatedExecutor:
    """Gives each plan, encoded and decoded as on its way to a process, to its replica's worker in this thread."""

    def __init__(self, *workers: SimulatedWorker) -> None:
        self.workers = workers
        self.steps: list[Step] = []

    def step(self, step: Step) -> Answered:
        call = _decode(_encode(Call(call_id=1, body=step, reply_ranks=(0,))))
        assert isinstance(call.body, Step)
        assert any(plan.shape.num_tokens for plan in call.body.plans), "an empty step"
        self.steps.append(call.body)
        return Answered(tuple(worker.run(plan) for worker, plan in zip(self.workers, call.body.plans, strict=True)))


class SimulatedPipeline:
    """Stages that take `stage_s` seconds for each step, one step at a time, on a clock that jumps.

    A worker, which has no time, does the work of all stages when a step is sent. What it answers can be had when the
    last stage has come to its end: whoever asks for it moves the clock to there.
    """

    def __init__(self, worker: SimulatedWorker, stage_s: Sequence[float]) -> None:
        self.now_s = 0.0
        self.busy_s = [0.0] * len(stage_s)
        """For how long each stage has computed, or will when all is done that was sent."""
        self.under_way: list[StepPlan] = []
        self.sent: list[tuple[StepPlan, ...]] = []
        """For each step that was sent, the steps then under way, itself the last."""
        self._executor = SimulatedExecutor(worker)
        self._stage_s = stage_s
        self._free_at_s = [0.0] * len(stage_s)

    def step(self, step: Step) -> AnswerOfStages:
        ready_at_s = self.now_s
        for stage, stage_s in enumerate(self._stage_s):
            ready_at_s = self._free_at_s[stage] = max(ready_at_s, self._free_at_s[stage]) + stage_s
            self.busy_s[stage] += stage_s
        (plan,) = step.plans
        self.under_way.append(plan)
        self.sent.append(tuple(self.under_way))
        return AnswerOfStages(self, self._executor.step(step).result(), ready_at_s)


class AnswerOfStages:
    """The answer of a pipeline's last stage."""

    def __init__(self, pipeline: SimulatedPipeline, results: tuple[StepResult, ...], ready_at_s: float) -> None:
        self._pipeline = pipeline
        self._results = results
        self._ready_at_s = ready_at_s

    def done(self) -> bool:
        return self._ready_at_s <= self._pipeline.now_s

    def result(self) -> tuple[StepResult, ...]:
        self._pipeline.now_s = max(self._pipeline.now_s, self._ready_at_s)
        assert self._pipeline.under_way.pop(0).step == self._results[0].step, "answers come in the order of the steps"
        return self._results


def expected_output(
    prompt: Sequence[int],
    sampling: SamplingParams,
    *,
    eos_token_ids: Sequence[int],
    max_model_len: int,
    vocab_size: int = 50,
) -> tuple[list[int], FinishReason]:
    """What a request makes, whatever else runs: worked out token by token, without any of the machinery."""
    state = token_hashes(prompt)[-1]
    ends = _end_token_ids(sampling, eos_token_ids)
    seed = _effective_seed(sampling, sampling.seed or 0)
    max_tokens = max_model_len - len(prompt)
    if sampling.max_tokens is not None:
        max_tokens = min(max_tokens, sampling.max_tokens)
    output: list[int] = []
    while len(output) < max_tokens:
        token = int(_mix(np.array([state ^ seed], dtype=np.uint64))[0]) % vocab_size
        if len(output) < sampling.min_tokens:
            token = _next_but(token, ends, vocab_size)
        output.append(token)
        if token in ends:
            return output, FinishReason.STOP
        state = ((state ^ token) * _FACTOR + 1) % _BITS
    return output, FinishReason.LENGTH


def expected_logprob(token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """The log-probability that goes with a token."""
    return (-0.5 - token_ids).astype(np.float32)


def token_hashes(token_ids: Sequence[int]) -> list[int]:
    """For each token the hash of the sequence up to it: what the worker stores for it."""
    state, hashes = _START, []
    for token in token_ids:
        state = ((state ^ token) * _FACTOR + 1) % _BITS
        hashes.append(state)
    return hashes


def _chain(states: Hashes, tokens: Hashes) -> Hashes:
    return (states ^ tokens) * np.uint64(_FACTOR) + np.uint64(1)


def _mix(states: Hashes) -> Hashes:
    states = (states ^ (states >> np.uint64(32))) * np.uint64(_FACTOR)
    return states ^ (states >> np.uint64(29))


def _effective_seed(sampling: SamplingParams, seed: int) -> int:
    """Only a seed that was asked for has an effect, or outputs could not be told beforehand."""
    return 0 if sampling.seed is None else seed % _BITS


def _end_token_ids(sampling: SamplingParams, eos_token_ids: Sequence[int]) -> set[int]:
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}


def _next_but(token: int, excluded: set[int], vocab_size: int) -> int:
    assert len(excluded) < vocab_size
    while token in excluded:
        token = (token + 1) % vocab_size
    return token


def _flatten(slots_R: Slots, starts_R: Counts, num_tokens_R: Counts) -> tuple[Slots, Counts]:
    """Slot and position of each token of the rows."""
    first_R = np.cumsum(num_tokens_R) - num_tokens_R
    positions_T = np.arange(num_tokens_R.sum()) + np.repeat(starts_R - first_R, num_tokens_R)
    return np.repeat(slots_R, num_tokens_R), positions_T
