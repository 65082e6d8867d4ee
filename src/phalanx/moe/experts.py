"""The experts of one layer on one rank: some of them whole, in the module of transformers that computes them.

Shape suffixes: T this replica's tokens, K experts of a token, N tokens that came to this rank, L this rank's experts
and one place for all others, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    compute = experts.forward
    device = next(experts.parameters()).device
    load = Load(mine, device)
    # One look-up instead of comparisons. NOWHERE is the last entry too, as what is not below `mine.stop` is.
    local_E = torch.full((mine.stop + 1,), mine.size, device=device)
    local_E[mine.start : mine.stop] = torch.arange(mine.size, device=device)

    def forward(hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dispatched = dispatcher.dispatch(hidden_TD, choose(experts_TK), weights_TK)
        local_NK = local_E[dispatched.experts_NK.clamp(max=mine.stop)]
        load.note(local_NK)
        out_ND = compute(dispatched.hidden_ND, local_NK, dispatched.weights_NK.to(weights_TK.dtype))
        return dispatcher.combine(dispatched, out_ND)

    experts.forward = forward
    return load
