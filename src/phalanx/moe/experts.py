"""The experts of one layer on one rank: some of them whole, in the module of transformers that computes them.

Shape suffixes: T this replica's tokens, K experts of a token, N tokens that came to this rank, P pairs of a token and
one of this rank's experts, L this rank's experts and one place for all others, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phalanx.moe import four_bits
from phalanx.moe.dispatcher import Dispatcher
from phalanx.topology.sharding import Span


class Load:
    """How many tokens came to each expert of one layer on one rank, since the start or the last `reset`.

    Padding counts as well.
    """

    def __init__(self, mine: Span, device: torch.device) -> None:
        self.mine = mine
        self._counts_L = torch.zeros(mine.size + 1, dtype=torch.int64, device=device)

    def note(self, local_NK: Tensor) -> None:
        """Count the experts of some tokens; `mine.size` is any other rank's. Does not wait for the device."""
        experts = local_NK.reshape(-1).long()
        self._counts_L.scatter_add_(0, experts, torch.ones_like(experts))

    def counts(self) -> list[int]:
        """By expert. Waits for the device."""
        return self._counts_L[:-1].tolist()

    def reset(self) -> None:
        """Begin anew: the experts are others now, or what was counted was nobody's."""
        self._counts_L.zero_()


def _as_they_are(experts_TK: Tensor) -> Tensor:
    return experts_TK


def share_out(
    experts: Any, mine: Span, dispatcher: Dispatcher, choose: Callable[[Tensor], Tensor] = _as_they_are
) -> Load:
    """Have a module with the weights of the physical experts `mine` answer for all of them, on every rank.

    `experts` is what transformers calls with hidden states [T, D] and the experts and weights [T, K] that a router
    chose for them; it gives [T, D]. `choose` gives the physical experts for those: by default they are the same.
    """
    experts.num_experts = mine.size
    load = Load(mine, next(experts.parameters()).device)

    def forward(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(hidden_TD, choose(experts_TK), weights_TK)
        is_mine_NK = (dispatched.experts_NK >= mine.start) & (dispatched.experts_NK < mine.stop)
        local_NK = torch.where(is_mine_NK, dispatched.experts_NK - mine.start, mine.size).long()
        weights_NK = dispatched.weights_NK.to(weights_TK.dtype)
        load.note(local_NK)
        if hidden_TD.device.type == "cpu":
            out_ND = _of_pairs(experts, dispatched.hidden_ND, local_NK, weights_NK, is_mine_NK)
        else:
            out_ND = _of_all(experts, dispatched.hidden_ND, local_NK, weights_NK)
        return dispatcher.combine(dispatched, out_ND)

    experts.forward = forward
    return load


def compute_in_groups(experts: Any) -> None:
    """Have a module that answers for all experts, with its part of each, compute them as `share_out` would on a GPU.

    transformers' own ways know no weights in 4 bits.
    """

    def forward(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return _of_all(experts, hidden_TD, experts_TK, weights_TK)

    experts.forward = forward


def _of_pairs(experts: Any, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor, is_mine_NK: Tensor) -> Tensor:
    """Computes nothing but what is this rank's. How much that is must be known first: a GPU would have to wait.

    Pairs are gathered once, in the order of their experts: the module's forward would sort and copy them once more.
    """
    out_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
    local_P, order_P = local_NK[is_mine_NK].sort(stable=True)
    if len(order_P):
        tokens_P = is_mine_NK.nonzero()[:, 0].index_select(0, order_P)
        weights_P1 = weights_NK[is_mine_NK].index_select(0, order_P)[:, None]
        ends_L = torch.bincount(local_P, minlength=experts.num_experts).cumsum(0).int()
        out_PD = _in_groups(experts, hidden_ND.index_select(0, tokens_P), local_P, ends_L)
        out_ND.index_add_(0, tokens_P, (out_PD * weights_P1).float())
    return out_ND.to(hidden_ND.dtype)


def _of_all(experts: Any, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """As `_of_pairs`, without waiting for the device to say how many are this rank's: the others are sorted behind.

    Grouped products leave those rows out, so that they hold whatever was there.
    """
    num_tokens, top_k = local_NK.shape
    if num_tokens == 0:
        return hidden_ND
    local_P, order_P = local_NK.flatten().sort(stable=True)
    ends_L = torch.searchsorted(local_P, torch.arange(experts.num_experts, device=local_P.device), right=True).int()
    of_others_P1 = (local_P == experts.num_experts)[:, None]
    out_PD = _in_groups(experts, hidden_ND.index_select(0, order_P // top_k), local_P, ends_L)
    out_PD = out_PD.masked_fill(of_others_P1, 0.0)
    # Back into the tokens' order, so that each one's sum has one order too; `index_add_` on a GPU has none.
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    out_NKD = out_PD.index_select(0, place_P).view(num_tokens, top_k, -1)
    return torch.bmm(weights_NK.to(out_NKD.dtype)[:, None], out_NKD)[:, 0]


def _in_groups(experts: Any, hidden_PD: Tensor, local_P: Tensor, ends_L: Tensor) -> Tensor:
    """What each row's expert makes of it, as in transformers' `grouped_mm_experts_forward`.

    Rows are in the order of their experts; `ends_L` is where each expert's end. What comes after the last is undefined.
    """
    from transformers.integrations.moe import _grouped_linear  # not before a rank can say what goes wrong with it

    num_experts = experts.num_experts

    def linear(name: str, x_PI: Tensor) -> Tensor:
        weight = getattr(experts, name)
        if isinstance(weight, four_bits.FourBitWeight):
            return four_bits.grouped_linear(x_PI, weight, ends_L)
        bias_PO = getattr(experts, f"{name}_bias")[local_P.clamp(max=num_experts - 1)] if experts.has_bias else None
        out_PO: Tensor = _grouped_linear(x_PI, weight, ends_L, bias_PO, experts.is_transposed)
        return out_PO

    if experts.has_gate:
        inner_PI = experts._apply_gate(linear("gate_up_proj", hidden_PD))
    else:
        inner_PI = experts.act_fn(linear("up_proj", hidden_PD))
    out_PD = linear("down_proj", inner_PI)
    # Of transformers 5.17 no module has one, nor says so.
    return experts.post_expert_norm(out_PD) if getattr(experts, "has_post_expert_norm", False) else out_PD
