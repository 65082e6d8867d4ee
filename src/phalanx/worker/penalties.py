"""Penalties for tokens that a request already has.

Shape suffixes: P penalised requests, R penalised rows of a step, L tokens of a request, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.worker.staging import to_device


class TokenHistory:
    """The tokens of each penalised request, and how often its output has each.

    Lies on the device and learns sampled tokens there, so that no step waits for the tokens of the one before. A
    request without penalties costs nothing. A step's cost grows with the requests' length, not with the vocabulary.
    """

    def __init__(self, vocab_size: int, max_model_len: int, device: torch.device) -> None:
        self._device = device
        self._tokens_PL = torch.zeros((0, max_model_len + 1), dtype=torch.int64, device=device)
        self._num_in_output_PV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._row_of_slot: dict[int, int] = {}
        self._free_rows: list[int] = []

    def admit(self, slot: int, token_ids: NDArray[np.int32], num_prompt: int) -> None:
        """Start with what is known: the prompt and, of a preempted request, what it had sampled before."""
        assert slot not in self._row_of_slot, f"slot {slot} was not dropped"
        if not self._free_rows:
            self._grow()
        row = self._row_of_slot[slot] = self._free_rows.pop()
        (ids,) = to_device([token_ids.astype(np.int64)], self._device)
        self._tokens_PL[row] = ids[0]  # rows of unequal length are read as one rectangle: repetitions do no harm
        self._tokens_PL[row, : len(ids)] = ids
        self._num_in_output_PV[row] = 0
        output = ids[num_prompt:]
        self._num_in_output_PV[row].scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def drop(self, slot: int) -> None:
        """Forget a slot, if it is known at all."""
        if slot in self._row_of_slot:
            self._free_rows.append(self._row_of_slot.pop(slot))

    def append(self, slots: NDArray[np.int64], positions: NDArray[np.int64], tokens_R: Tensor) -> None:
        """One more output token for each slot, which are distinct."""
        rows_R, positions_R = to_device([self._rows(slots), positions], self._device)
        self._tokens_PL[rows_R, positions_R] = tokens_R
        self._num_in_output_PV[rows_R, tokens_R] += 1

    def penalise(
        self,
        logits_RV: Tensor,
        at: NDArray[np.int64],
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        sampling_R: NDArray[Any],
    ) -> None:
        """Repetition, frequency and presence penalties (in this order, defined as in vLLM) on rows `at` of the logits.

        `positions` is how many tokens each slot has.
        """
        columns = [sampling_R[f"{kind}_penalty"][:, None].copy() for kind in ("repetition", "frequency", "presence")]
        at_R1, rows_R1, repetition_R1, frequency_R1, presence_R1 = to_device(
            [at[:, None].copy(), self._rows(slots)[:, None], *columns], self._device
        )
        ids_RL = self._tokens_PL[rows_R1[:, 0], : int(positions.max())]
        logits_RL = logits_RV[at_R1, ids_RL]
        num_in_output_RL = self._num_in_output_PV[rows_R1, ids_RL]
        logits_RL = torch.where(logits_RL > 0, logits_RL / repetition_R1, logits_RL * repetition_R1)
        logits_RV[at_R1, ids_RL] = logits_RL - frequency_R1 * num_in_output_RL - presence_R1 * (num_in_output_RL > 0)

    def _rows(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self._row_of_slot[slot] for slot in slots.tolist()], dtype=np.int64)

    def _grow(self) -> None:
        num_rows = len(self._tokens_PL)
        num_more = max(num_rows, 4)
        self._free_rows.extend(range(num_rows, num_rows + num_more))
        self._tokens_PL, self._num_in_output_PV = (
            torch.cat([old, old.new_zeros(num_more, old.shape[1])]) for old in (self._tokens_PL, self._num_in_output_PV)
        )
