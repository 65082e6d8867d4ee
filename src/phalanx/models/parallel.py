"""Layers whose work is shared out over the ranks of a group.

A layer that shares out its outputs needs no class: it is an ordinary linear layer with fewer of them.

Shape suffixes: T tokens, D hidden size, I this rank's inputs, P this rank's part of the vocabulary, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from phalanx.collectives.group import Group
from phalanx.models.packed import Linear, Product


class RowParallelLinear(nn.Module):
    """A linear layer of which each rank has some inputs: the ranks' products are summed, then the bias is added."""

    def __init__(self, name: str, weight: nn.Parameter, bias: nn.Parameter | None, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.product = Product(Linear(name, weight))
        self._group = group

    def forward(self, x_1TI: Tensor) -> Tensor:
        """[1, T, I] to [1, T, D], the same on every rank."""
        (out_1TD,) = self.product(x_1TI)
        out_1TD = self._group.all_reduce(out_1TD)
        return out_1TD if self.bias is None else out_1TD + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has an equal part of the rows."""

    def __init__(self, weight: nn.Parameter, group: Group) -> None:
        super().__init__()
        self.weight = weight
        self._group = group
        self._first = group.rank * weight.shape[0]

    def forward(self, token_ids_1T: Tensor) -> Tensor:
        """[1, T] to [1, T, D], the same on every rank."""
        row_1T = token_ids_1T - self._first
        is_ours_1T = (row_1T >= 0) & (row_1T < self.weight.shape[0])
        out_1TD = functional.embedding(torch.where(is_ours_1T, row_1T, 0), self.weight)
        return self._group.all_reduce(out_1TD.masked_fill_(~is_ours_1T[..., None], 0))


class VocabParallelHead:
    """The last linear layer, of which each rank has an equal part of the outputs."""

    def __init__(self, name: str, weight: Tensor, vocab_size: int, group: Group) -> None:
        self.product = Product(Linear(name, weight))
        self._vocab_size = vocab_size
        self._group = group

    def __call__(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] in float32, the same on every rank."""
        (logits_TP,) = self.product(hidden_TD)
        return self._group.all_gather(logits_TP)[:, : self._vocab_size].float()


def sum_output(module: nn.Module, group: Group) -> None:
    """Have the ranks sum what the module returns: experts, each rank with some of every expert's inner columns."""

    def all_reduce(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return group.all_reduce(output)

    module.register_forward_hook(all_reduce)
