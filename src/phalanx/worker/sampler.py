"""From logits to tokens.

Shape suffixes: R rows that sample, V vocabulary, K most likely tokens, E rows that asked for log-probabilities.

A row's outcome depends on that row alone: on its logits, its parameters, its seed and its position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.protocol.columns import as_ints
from phalanx.protocol.sampling import MAX_LOGPROBS
from phalanx.protocol.worker import NO_TOKEN, NewRequest
from phalanx.worker.draw import WEIGHT_BITS, inverse_cdf, weights_of
from phalanx.worker.penalties import TokenHistory
from phalanx.worker.randomness import uniform
from phalanx.worker.slots import SlotTable
from phalanx.worker.staging import to_device


@dataclass(frozen=True, slots=True)
class Logprobs:
    """On the device, but for `entries_E`, the rows that they are for. The most likely of K tokens come first."""

    entries_E: NDArray[np.int64]
    chosen_E: Tensor
    top_ids_EK: Tensor
    top_EK: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """On the device; `tokens_R` is int64, NO_TOKEN where there is no token."""

    tokens_R: Tensor
    logprobs: Logprobs | None = None


class Sampler:
    """Chooses tokens for the requests of a SlotTable. Never waits for a GPU."""

    def __init__(self, slots: SlotTable, vocab_size: int, device: torch.device) -> None:
        assert vocab_size < 2 ** (62 - WEIGHT_BITS)
        self._slots = slots
        self._vocab_size = vocab_size
        self._device = device
        self._history = TokenHistory(vocab_size, slots.max_model_len, device)

    def admit(self, request: NewRequest) -> None:
        """Take in what the slot table has taken in."""
        if self._slots.sampling_S[request.slot]["is_penalised"]:
            self._history.admit(request.slot, as_ints(request.token_ids), request.num_prompt)

    def drop(self, slot: int) -> None:
        self._history.drop(slot)

    def sample(self, logits_RV: Tensor, slots_R: NDArray[np.int64], positions_R: NDArray[np.int64]) -> Sampled:
        """Choose the token that stands at `positions_R` of each slot. Overwrites `logits_RV` (float32).

        In this order, as in vLLM: log-probabilities of the raw logits, penalties, min_tokens, temperature, min-p,
        top-k, top-p, choice. Ties are broken towards the lower token id.
        """
        sampling_R = self._slots.sampling_S[slots_R]
        if sampling_R["is_plain"].all():
            return Sampled(_most_likely(logits_RV)[0])
        asking = np.flatnonzero(sampling_R["num_logprobs"] >= 0)
        raw_EV = logits_RV[self._upload(asking)] if len(asking) else None
        penalised = np.flatnonzero(sampling_R["is_penalised"])
        if len(penalised):
            self._history.penalise(
                logits_RV, penalised, slots_R[penalised], positions_R[penalised], sampling_R[penalised]
            )
        self._forbid_early_end(logits_RV, slots_R, positions_R, sampling_R)
        tokens_R, top_R = _most_likely(logits_RV)
        is_random_R, is_limited_R = ~sampling_R["is_greedy"], sampling_R["is_limited"]
        for is_drawn_R in (is_random_R & is_limited_R, is_random_R & ~is_limited_R):
            rows = np.flatnonzero(is_drawn_R)
            if len(rows):
                self._draw(rows, tokens_R, top_R, logits_RV, positions_R[rows], sampling_R[rows])
        if len(penalised):
            tokens = tokens_R[self._upload(penalised)].clamp_(min=0)
            self._history.append(slots_R[penalised], positions_R[penalised], tokens)
        if raw_EV is None:
            return Sampled(tokens_R)
        return Sampled(tokens_R, _logprobs(raw_EV, tokens_R, asking, int(sampling_R["num_logprobs"].max())))

    def _upload(self, rows: NDArray[np.int64]) -> Tensor:
        return to_device([rows], self._device)[0]

    def _forbid_early_end(
        self,
        logits_RV: Tensor,
        slots_R: NDArray[np.int64],
        positions_R: NDArray[np.int64],
        sampling_R: NDArray[Any],
    ) -> None:
        rows = np.flatnonzero(positions_R - sampling_R["num_prompt"] < sampling_R["min_tokens"])
        pairs = [
            (row, token_id)
            for row in rows.tolist()
            for token_id in self._slots.end_token_ids[slots_R[row]]
            if 0 <= token_id < self._vocab_size  # a user may name a stop token that the model does not have
        ]
        if pairs:
            row_ids, token_ids = np.array(pairs, dtype=np.int64).T.copy()
            never = logits_RV.new_full((), -math.inf)  # a Python number would be copied to a GPU, which waits
            logits_RV.index_put_(tuple(to_device([row_ids, token_ids], self._device)), never)

    def _draw(
        self,
        rows: NDArray[np.int64],
        tokens_R: Tensor,
        top_R: Tensor,
        logits_RV: Tensor,
        positions: NDArray[np.int64],
        sampling: NDArray[Any],
    ) -> None:
        """Replace the most likely tokens of some rows by drawn ones."""
        at, uniforms = to_device([rows, uniform(sampling["seed"], positions)], self._device)
        logits = logits_RV if len(rows) == len(logits_RV) else logits_RV[at]
        drawn = inverse_cdf(weights_of(logits, top_R[at], sampling), uniforms)
        tokens_R[at] = torch.where(top_R[at] > -math.inf, drawn, NO_TOKEN)


def _most_likely(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the most likely tokens of each row, NO_TOKEN where there is none, and their logits."""
    if logits_RV.device.type == "cpu":
        tokens_R = torch.from_numpy(logits_RV.numpy().argmax(-1))  # torch's takes ten times as long (2.13)
    else:
        tokens_R = logits_RV.argmax(-1)
    top_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]  # NaN if the row has any: argmax stops at the first
    return torch.where(top_R > -math.inf, tokens_R, NO_TOKEN), top_R


def _logprobs(raw_EV: Tensor, tokens_R: Tensor, asking: NDArray[np.int64], width: int) -> Logprobs:
    """Of the chosen tokens and of the `width` most likely ones. Overwrites `raw_EV`.

    As many are always looked for, whatever was asked: which of several tied tokens come out must not depend on others.
    """
    (at,) = to_device([asking], raw_EV.device)
    chosen_E1 = tokens_R[at].clamp_(min=0)[:, None]
    logprobs_EV = raw_EV.clamp_(max=torch.finfo(raw_EV.dtype).max).log_softmax(-1)
    ids_EK = logprobs_EV.topk(min(MAX_LOGPROBS, logprobs_EV.shape[1])).indices.sort(-1).values
    top_EK, order_EK = torch.sort(logprobs_EV.gather(1, ids_EK), dim=-1, descending=True, stable=True)
    return Logprobs(
        asking, logprobs_EV.gather(1, chosen_E1)[:, 0], ids_EK.gather(1, order_EK)[:, :width], top_EK[:, :width]
    )
