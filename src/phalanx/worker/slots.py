"""What a worker knows of each request, by slot: numpy columns, changed by the deltas of the plans.

Shape suffixes: S all slots, R rows of a step, B blocks of a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.protocol.columns import as_ints
from phalanx.protocol.worker import NewRequest, StepPlan

GREEDY_TEMPERATURE = 1e-5
"""Below it sampling is greedy: in float32 no token but the most likely would be left anyway."""

UNBOUNDED = 2**31
"""More than any vocabulary or length. Users may ask for numbers that no column holds."""

SAMPLING = np.dtype(
    [
        ("is_plain", np.bool_),  # greedy, and nothing else asked for
        ("is_greedy", np.bool_),
        ("is_limited", np.bool_),  # by top-k, top-p or min-p
        ("is_penalised", np.bool_),
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("repetition_penalty", np.float32),
        ("num_logprobs", np.int64),  # -1: none asked for
        ("num_prompt", np.int64),
        ("min_tokens", np.int64),
        ("seed", np.uint64),
    ]
)
"""How a request's tokens are chosen. `top_k` 0 keeps all tokens."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step. `num_computed_R` counts the tokens before it, `samples_R` tells who samples after it."""

    slots_R: NDArray[np.int64]
    num_tokens_R: NDArray[np.int64]
    num_computed_R: NDArray[np.int64]
    samples_R: NDArray[np.bool_]


class SlotTable:
    """Requests by slot. Every violation of StepPlan's contract is an assertion: it would be the brain's mistake.

    `given[slot]` holds the token ids that came with the request, and `num_known_S` counts these and what was sampled
    since. Sampled ids stay on the device: nobody needs them here, and waiting for them would stall the next step.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, num_blocks: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.block_tables_SB = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_known_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_given_S = np.zeros(max_num_seqs, dtype=np.int64)
        self.sampling_S = np.zeros(max_num_seqs, dtype=SAMPLING)
        self.given: list[NDArray[np.int32] | None] = [None] * max_num_seqs
        self.end_token_ids: list[tuple[int, ...]] = [()] * max_num_seqs
        self.num_cache_blocks = num_blocks

    def apply(self, plan: StepPlan) -> None:
        """Carry out a plan's changes: drop, take in, append blocks, in this order."""
        for slot in as_ints(plan.dropped).tolist():
            assert self.given[slot] is not None, f"step {plan.step} drops slot {slot}, which is free"
            self.given[slot] = None
            self.num_known_S[slot] = 0
        for request in plan.new:
            self._admit(request)
        if plan.block_ids:
            self._append_blocks(as_ints(plan.block_slots), as_ints(plan.block_ids))

    def advance(self, plan: StepPlan) -> Rows:
        """Count the plan's tokens as computed, and one more as known for each row that samples."""
        slots_R = as_ints(plan.slots).astype(np.int64)
        num_tokens_R = as_ints(plan.num_tokens).astype(np.int64)
        num_computed_R = self.num_computed_S[slots_R]
        after_R = num_computed_R + num_tokens_R
        known_R = self.num_known_S[slots_R]
        samples_R = after_R == known_R
        self._check(plan, slots_R, num_tokens_R, after_R, samples_R)
        self.num_computed_S[slots_R] = after_R
        self.num_known_S[slots_R] = known_R + samples_R
        return Rows(slots_R, num_tokens_R, num_computed_R, samples_R)

    def _admit(self, request: NewRequest) -> None:
        slot, token_ids, blocks = request.slot, as_ints(request.token_ids), as_ints(request.blocks)
        assert self.given[slot] is None, f"slot {slot} is given twice"
        assert request.num_computed < len(token_ids) <= self.max_model_len
        assert request.num_prompt <= len(token_ids)
        self.given[slot] = token_ids
        self.num_given_S[slot] = self.num_known_S[slot] = len(token_ids)
        self.num_computed_S[slot] = request.num_computed
        self.num_blocks_S[slot] = 0
        self._append_blocks(np.full(len(blocks), slot, dtype=np.int32), blocks)
        self.sampling_S[slot] = _sampling_row(request)
        ends = request.sampling.stop_token_ids
        self.end_token_ids[slot] = ends if request.sampling.ignore_eos else (*ends, *request.eos_token_ids)

    def _append_blocks(self, slots: NDArray[np.int32], blocks: NDArray[np.int32]) -> None:
        assert len(slots) == len(blocks)
        assert not len(blocks) or 0 <= blocks.min() <= blocks.max() < self.num_cache_blocks, "no such block"
        order = np.argsort(slots, kind="stable")  # a slot may get several blocks, which keep their order
        slots, blocks = slots[order], blocks[order]
        rank = np.arange(len(slots)) - np.searchsorted(slots, slots)
        self.block_tables_SB[slots, self.num_blocks_S[slots] + rank] = blocks
        np.add.at(self.num_blocks_S, slots, 1)

    def _check(
        self,
        plan: StepPlan,
        slots_R: NDArray[np.int64],
        num_tokens_R: NDArray[np.int64],
        after_R: NDArray[np.int64],
        samples_R: NDArray[np.bool_],
    ) -> None:
        step, shape = plan.step, plan.shape
        found = (int(num_tokens_R.sum()), len(slots_R), int(samples_R.sum()))
        stated = (shape.num_tokens, shape.num_rows, shape.num_samples)
        assert found == stated, f"step {step}: tokens, rows and samples are {found}, its shape says {stated}"
        if not len(slots_R):
            return
        assert num_tokens_R.min() > 0, f"step {step} has a row without tokens"
        assert (np.diff((num_tokens_R > 1).view(np.int8)) >= 0).all(), f"step {step}: rows with one token come first"
        assert (after_R <= self.num_known_S[slots_R]).all(), f"step {step} computes tokens that nobody knows"
        assert (after_R <= self.num_blocks_S[slots_R] * self.block_size).all(), f"step {step} has too few blocks"


def _sampling_row(request: NewRequest) -> tuple[object, ...]:
    """In the order of SAMPLING."""
    asked = request.sampling
    is_greedy = asked.temperature < GREEDY_TEMPERATURE
    is_penalised = (asked.presence_penalty, asked.frequency_penalty, asked.repetition_penalty) != (0.0, 0.0, 1.0)
    return (
        is_greedy and not is_penalised and asked.logprobs is None and asked.min_tokens == 0,
        is_greedy,
        asked.top_k > 0 or asked.top_p < 1.0 or asked.min_p > 0.0,
        is_penalised,
        asked.temperature,
        min(max(asked.top_k, 0), UNBOUNDED),
        asked.top_p,
        asked.min_p,
        asked.presence_penalty,
        asked.frequency_penalty,
        asked.repetition_penalty,
        -1 if asked.logprobs is None else asked.logprobs,
        request.num_prompt,
        min(asked.min_tokens, UNBOUNDED),
        request.seed % 2**64,
    )
