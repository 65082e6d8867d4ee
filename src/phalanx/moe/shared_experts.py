"""The experts of one layer, shared out to ranks, some with copies; between steps they can change places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.moe.balance import first_placement
from phalanx.moe.copies import Copies, ExpertWeights, PlainWeights, exchange
from phalanx.moe.dispatcher import Dispatcher
from phalanx.moe.expert_products import ExpertProducts
from phalanx.moe.experts import share_out
from phalanx.topology.sharding import Span


class SharedExperts:
    """One layer's experts on one rank: which they are, what comes to them, and how they change."""

    def __init__(
        self,
        module: Any,
        products: ExpertProducts | None,
        mine: Span,
        dispatcher: Dispatcher,
        *,
        num_redundant: int,
    ) -> None:
        """`module` is made for all of the model's experts, and has the weights of the physical experts `mine`.

        `products` are what it computes by, on a CPU.
        """
        self.module = module
        self._num_experts: int = module.num_experts
        self._num_redundant = num_redundant
        self._device = next(module.parameters()).device
        linears = products.linears if products is not None else {}
        self._weights: list[ExpertWeights] = [  # in the same order on every rank
            linears.get(name) or PlainWeights(parameter.data) for name, parameter in module.named_parameters()
        ]
        self._mine = mine
        self._dispatcher = dispatcher
        self.load = share_out(module, mine, dispatcher, self._choose)
        self.begin()

    def begin(self) -> None:
        """The weights are those of a checkpoint, with every expert where it is at first; nothing was counted."""
        placement = first_placement(self._num_experts, self._num_redundant)
        self._copies = Copies(placement, self._num_experts, self._device)
        self._before_move = [0] * self._num_experts
        self.load.reset()
        self.num_moves = 0

    @property
    def mine(self) -> tuple[int, ...]:
        """The logical expert of each physical one on this rank."""
        return self._copies.placement[self._mine.start : self._mine.stop]

    def num_tokens(self) -> list[int]:
        """How many tokens this rank has computed for each logical expert, since the start. Waits for the device."""
        counts = list(self._before_move)
        for expert, count in zip(self.mine, self.load.counts(), strict=True):
            counts[expert] += count
        return counts

    def move(self, placement: Sequence[int], group: Group) -> None:
        """Exchange weights with the other ranks of `group`, which all call it with the same, between two steps.

        Takes memory for what is sent and received of one parameter of the layer. Raises what the group raises.
        """
        self._before_move = self.num_tokens()
        exchange(self._weights, self._copies.placement, placement, group)
        self._copies = self._copies.moved(placement)
        self.load.reset()
        self.num_moves += 1

    def _choose(self, experts_TK: Tensor) -> Tensor:
        return self._copies.choose(experts_TK, self._dispatcher.first_token)
