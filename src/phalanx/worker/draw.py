"""Random choice of tokens: temperature, min-p, top-k, top-p, and the inverse of the cumulative distribution.

Shape suffixes: R rows, V vocabulary, K candidates, N weights to choose from; 1 is kept for broadcasting.

The choice goes through the vocabulary in its own order, not in that of probability, so that noise in the logits
(another tensor-parallel size, another batch) moves the borders between tokens by no more than itself.

On a CPU every pass over [R, V] counts. There torch's comparisons into a bool tensor, `masked_fill` and selections are 3
to 16 times slower than what stands here instead (torch 2.13, numpy 2.4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from phalanx.worker.staging import to_device

FIRST_CANDIDATES = 1024
"""How many of the most likely tokens top-p looks at first on a CPU, where sorting all of them is what costs."""

SPAN = 128
"""Tokens whose weights are added up before the choice, which then takes a span and in it a token."""

WEIGHT_BITS = 43
"""The largest weight is 2**43 as an integer: 2**19 of them still add up within an int64."""


def weights_of(logits_RV: Tensor, top_R: Tensor, sampling_R: NDArray[Any]) -> Tensor:
    """Probabilities up to a factor per row: 1 for the most likely token, 0 for what the row's limits leave out.

    `top_R` are the rows' largest logits. Limits count in the order min-p, top-k, top-p; ties at the border are kept in
    the order of token ids, so that exactly as many tokens stay as were asked for. Overwrites `logits_RV`.
    """
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    columns = [sampling_R[name][:, None].copy() for name in ("temperature", "min_p", "top_p")]
    top_k = np.where(sampling_R["top_k"] > 0, sampling_R["top_k"], vocab_size).clip(max=vocab_size)[:, None]
    temperature_R1, min_p_R1, top_p_R1, top_k_R1 = to_device([*columns, top_k], device)
    scores_RV = _scores(logits_RV, top_R, temperature_R1)
    if not sampling_R["is_limited"].any():
        return scores_RV.exp_()
    weights_RV = scores_RV.exp()
    if (sampling_R["min_p"] > 0.0).any():
        _drop_below(weights_RV, weights_RV.clone(), min_p_R1)
    if (top_k < vocab_size).any() or (sampling_R["top_p"] < 1.0).any():
        num_candidates = _num_candidates(top_k, vocab_size, device)
        border = _border(scores_RV, weights_RV, num_candidates, top_k_R1, top_p_R1, min_p_R1)
        _drop_surplus(weights_RV, scores_RV, border)
        _drop_below(weights_RV, scores_RV, border.lowest_R1)
    return weights_RV


def inverse_cdf(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token in whose share of the total weight `uniform_R` (float64, from 0 to below 1) falls.

    Never one of weight 0. Of a row without any weight, or with NaN, some token of the vocabulary.
    """
    num_rows, vocab_size = weights_RV.shape
    if vocab_size % SPAN:
        weights_RV = pad(weights_RV, (0, -vocab_size % SPAN))
    spans = weights_RV.reshape(num_rows, -1, SPAN)
    span_R, rest_R = _choose(spans.sum(-1), uniform_R)
    inside_R, _ = _choose(spans[torch.arange(num_rows, device=spans.device), span_R], rest_R)
    return (span_R * SPAN + inside_R).clamp(max=vocab_size - 1)


def _choose(weights_RN: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """The index in whose share of the total `uniform_R` falls, and where in that share, from 0 to 1.

    As integers the weights have exact, ever growing sums on every device, whatever the order of addition: so the first
    sum above a number below the total is always there, and the weight that it adds is never zero.
    """
    largest_R1 = weights_RN.amax(-1, keepdim=True)
    whole_RN = (weights_RN / largest_R1).mul_(2.0**WEIGHT_BITS).to(torch.int64)
    cumulative_RN = whole_RN.cumsum(-1)
    total_R1 = cumulative_RN[:, -1:]
    point_R1 = uniform_R[:, None] * total_R1
    below_R1 = torch.minimum(point_R1.to(torch.int64), total_R1 - 1)  # a share may be rounded up to 1
    index_R1 = torch.searchsorted(cumulative_RN, below_R1, right=True)
    index_R1.clamp_(max=weights_RN.shape[1] - 1)  # for rows without a token: they may hold anything
    weight_R1 = whole_RN.gather(-1, index_R1)
    before_R1 = cumulative_RN.gather(-1, index_R1) - weight_R1
    return index_R1[:, 0], ((point_R1 - before_R1) / weight_R1)[:, 0]


def _scores(logits_RV: Tensor, top_R: Tensor, temperature_R1: Tensor) -> Tensor:
    """Logarithms of the weights: 0 for the most likely token, less for all others. Overwrites `logits_RV`.

    An infinite logit counts as the largest number, so that tokens that share it share the probability.
    """
    top_R1 = top_R.clamp(max=torch.finfo(logits_RV.dtype).max)[:, None]
    return logits_RV.sub_(top_R1).clamp_(max=0.0).div_(temperature_R1)


class Border(NamedTuple):
    """Where top-k and top-p end: the lowest score that stays, how many tokens of that score, and whether not all."""

    lowest_R1: Tensor
    num_tied_R1: Tensor
    has_surplus_R1: Tensor


def _border(
    scores_RV: Tensor,
    weights_RV: Tensor,
    num_candidates: int,
    top_k_R1: Tensor,
    top_p_R1: Tensor,
    min_p_R1: Tensor,
) -> Border:
    vocab_size, device = scores_RV.shape[1], scores_RV.device
    largest_RK = _largest(scores_RV, num_candidates)
    in_top_k_RK = torch.arange(num_candidates, device=device) < top_k_R1
    candidate_RK = largest_RK.exp()
    candidate_RK = candidate_RK.double() * (in_top_k_RK & (candidate_RK >= min_p_R1))
    total_R1 = torch.where(
        top_k_R1 < vocab_size, candidate_RK.sum(-1, keepdim=True), weights_RV.sum(-1, keepdim=True).double()
    )
    before_RK = candidate_RK.cumsum(-1) - candidate_RK
    num_kept_R1 = (in_top_k_RK & (before_RK < top_p_R1 * total_R1)).sum(-1, keepdim=True)
    # The candidate after the last one kept must be known too, as it may tie with it.
    if num_candidates < vocab_size and device.type == "cpu" and int(num_kept_R1.max()) == num_candidates:
        more_candidates = min(8 * num_candidates, vocab_size)
        return _border(scores_RV, weights_RV, more_candidates, top_k_R1, top_p_R1, min_p_R1)
    lowest_R1 = largest_RK.gather(-1, num_kept_R1.sub(1).clamp_(min=0))
    next_R1 = largest_RK.gather(-1, num_kept_R1.clamp(max=num_candidates - 1))
    return Border(
        lowest_R1,
        num_kept_R1 - (largest_RK > lowest_R1).sum(-1, keepdim=True),
        (next_R1 == lowest_R1) & (num_kept_R1 < num_candidates),
    )


def _num_candidates(top_k: NDArray[np.int64], vocab_size: int, device: torch.device) -> int:
    """How many of the largest scores surely, or on a CPU probably, hold all that stays and one more."""
    limits = top_k[top_k < vocab_size]
    num_candidates = int(limits.max()) + 1 if len(limits) else 1
    if len(limits) < len(top_k):
        num_candidates = max(num_candidates, FIRST_CANDIDATES) if device.type == "cpu" else vocab_size
    return min(num_candidates, vocab_size)


def _largest(scores_RV: Tensor, num_candidates: int) -> Tensor:
    """The largest scores of each row in descending order."""
    if scores_RV.device.type != "cpu":
        return scores_RV.topk(num_candidates).values
    scores, first = scores_RV.numpy(), scores_RV.shape[1] - num_candidates
    if first:
        scores = np.partition(scores, first, axis=-1)[:, first:]
    return torch.from_numpy(np.sort(scores, axis=-1)[:, ::-1].copy())


def _drop_below(weights_RV: Tensor, keys_RV: Tensor, lowest_R1: Tensor) -> None:
    """Zero the weights whose key is less than `lowest_R1`. Overwrites the keys, with 1.0 and 0.0."""
    weights_RV.mul_(keys_RV.ge_(lowest_R1))


def _drop_surplus(weights_RV: Tensor, scores_RV: Tensor, border: Border) -> None:
    """Zero the weights of the tokens at the border that are too many: those with the highest ids."""
    rows_R = torch.arange(len(weights_RV), device=weights_RV.device)
    if weights_RV.device.type == "cpu":  # a GPU would have to be waited for
        rows_R = rows_R[border.has_surplus_R1[:, 0]]
        if not len(rows_R):
            return
    tied_RV = scores_RV[rows_R] == border.lowest_R1[rows_R]
    is_surplus_RV = tied_RV & (tied_RV.cumsum(-1) > border.num_tied_R1[rows_R])
    weights_RV[rows_R] = weights_RV[rows_R].masked_fill_(is_surplus_RV, 0.0)
