"""A step's inputs to the model, from the rows of its plan.

Shape suffixes: T tokens of the step, R rows, N rows that compute a token which an earlier step sampled, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phalanx.protocol.columns import as_ints
from phalanx.protocol.worker import StepPlan
from phalanx.worker.slots import Rows, SlotTable


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Host arrays of one step. Token ids that the plan does not tell, as only the device knows them, are 0: they are to
    be filled in at `sampled_at_N`.
    """

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    query_starts_R1: NDArray[np.int32]
    context_lens_R: NDArray[np.int32]
    block_tables_RB: NDArray[np.int32]
    cache_slots_T: NDArray[np.int64]
    """Where in the cache each token's keys and values go: block * block_size + offset."""
    sampled_at_N: NDArray[np.int64]
    sampled_slots_N: NDArray[np.int64]
    max_query_len: int
    max_context_len: int
    num_decodes: int

    @property
    def arrays(self) -> tuple[NDArray[np.int64] | NDArray[np.int32], ...]:
        """What the device needs, in the order of the fields."""
        return (
            self.token_ids_T,
            self.positions_T,
            self.query_starts_R1,
            self.context_lens_R,
            self.block_tables_RB,
            self.cache_slots_T,
            self.sampled_at_N,
            self.sampled_slots_N,
        )

    @classmethod
    def of(cls, plan: StepPlan, rows: Rows, table: SlotTable) -> StepInputs:
        """Of the plan's rows, of which there is at least one."""
        context_lens_R = rows.num_computed_R + rows.num_tokens_R
        starts_R1 = np.zeros(len(context_lens_R) + 1, dtype=np.int64)
        np.cumsum(rows.num_tokens_R, out=starts_R1[1:])
        starts_R = starts_R1[:-1]
        positions_T = np.arange(starts_R1[-1]) + np.repeat(rows.num_computed_R - starts_R, rows.num_tokens_R)
        is_sampled_R = rows.num_computed_R >= table.num_given_S[rows.slots_R]
        max_context_len = int(context_lens_R.max())
        token_ids_T = _given_token_ids(rows, table, starts_R1, ~is_sampled_R)
        if plan.token_slots:
            assert np.array_equal(as_ints(plan.token_slots), rows.slots_R[is_sampled_R]), "tokens of other rows"
            token_ids_T[starts_R[is_sampled_R]] = as_ints(plan.tokens)
            is_sampled_R = np.zeros_like(is_sampled_R)
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            query_starts_R1=starts_R1.astype(np.int32),
            context_lens_R=context_lens_R.astype(np.int32),
            block_tables_RB=table.block_tables_SB[rows.slots_R, : -(-max_context_len // table.block_size)],
            cache_slots_T=_cache_slots(rows, table, positions_T),
            sampled_at_N=starts_R[is_sampled_R],
            sampled_slots_N=rows.slots_R[is_sampled_R],
            max_query_len=int(rows.num_tokens_R.max()),
            max_context_len=max_context_len,
            num_decodes=int((rows.num_tokens_R == 1).sum()),
        )

    def padded_to(self, num_rows: int, table: SlotTable) -> StepInputs:
        """With rows that are nobody's behind those that are there, all of one token."""
        num_padding = num_rows - len(self.token_ids_T)
        if num_padding == 0:
            return self
        zeros = np.zeros(num_padding, dtype=np.int64)
        null = table.num_cache_blocks
        tables = np.full((num_padding, self.block_tables_RB.shape[1]), null, dtype=np.int32)
        return StepInputs(
            token_ids_T=np.concatenate([self.token_ids_T, zeros]),
            positions_T=np.concatenate([self.positions_T, zeros]),
            query_starts_R1=np.arange(num_rows + 1, dtype=np.int32),
            context_lens_R=np.concatenate([self.context_lens_R, np.ones(num_padding, dtype=np.int32)]),
            block_tables_RB=np.concatenate([self.block_tables_RB, tables]),
            cache_slots_T=np.concatenate([self.cache_slots_T, zeros + null * table.block_size]),
            sampled_at_N=self.sampled_at_N,
            sampled_slots_N=self.sampled_slots_N,
            max_query_len=1,
            max_context_len=self.max_context_len,
            num_decodes=num_rows,
        )

    @classmethod
    def padding(cls, table: SlotTable) -> StepInputs:
        """One token that is nobody's. Its key and value go into the block after those that can be planned with."""
        none, zero = np.empty(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
        return cls(
            token_ids_T=zero,
            positions_T=zero,
            query_starts_R1=np.array([0, 1], dtype=np.int32),
            context_lens_R=np.ones(1, dtype=np.int32),
            block_tables_RB=np.full((1, 1), table.num_cache_blocks, dtype=np.int32),
            cache_slots_T=np.array([table.num_cache_blocks * table.block_size]),
            sampled_at_N=none,
            sampled_slots_N=none,
            max_query_len=1,
            max_context_len=1,
            num_decodes=1,
        )


def _given_token_ids(
    rows: Rows, table: SlotTable, starts_R1: NDArray[np.int64], is_given_R: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Token ids of the rows whose ids came with the request; 0 for the others."""
    token_ids_T = np.zeros(starts_R1[-1], dtype=np.int64)
    for row in np.flatnonzero(is_given_R).tolist():
        given = table.given[rows.slots_R[row]]
        assert given is not None
        first = rows.num_computed_R[row]
        token_ids_T[starts_R1[row] : starts_R1[row + 1]] = given[first : first + rows.num_tokens_R[row]]
    return token_ids_T


def _cache_slots(rows: Rows, table: SlotTable, positions_T: NDArray[np.int64]) -> NDArray[np.int64]:
    blocks_T = table.block_tables_SB[
        np.repeat(rows.slots_R, rows.num_tokens_R), positions_T // table.block_size
    ].astype(np.int64)
    return blocks_T * table.block_size + positions_T % table.block_size
