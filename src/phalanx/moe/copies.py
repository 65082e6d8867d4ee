"""Copies of experts on several ranks: which of them a token goes to, and how ranks exchange them.

Shape suffixes: T a replica's tokens, K experts of a token, E logical experts, C copies of an expert, S physical experts
of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phalanx.collectives.group import Group


class Copies:
    """Where the copies of one layer's experts are. All ranks that share the experts out have the same."""

    def __init__(self, placement: Sequence[int], num_experts: int, device: torch.device) -> None:
        """`placement`: for each physical expert the logical one; each of these is there."""
        self.placement = tuple(placement)
        self._num_experts = num_experts
        self._device = device
        self._table_EC: Tensor | None = None
        self._num_copies_E: Tensor | None = None
        if self.placement != tuple(range(num_experts)):
            self._tabulate()

    def moved(self, placement: Sequence[int]) -> Copies:
        """The same experts, elsewhere."""
        assert len(placement) == len(self.placement)
        return Copies(placement, self._num_experts, self._device)

    def choose(self, experts_TK: Tensor, first_token: int = 0) -> Tensor:
        """The physical experts for tokens' logical ones: the tokens of a step take the copies in turn.

        `first_token` is where these begin among the tokens of all replicas. Every rank of a replica chooses the same,
        without asking another.
        """
        if self._table_EC is None or self._num_copies_E is None:
            return experts_TK
        experts_TK = experts_TK.long()
        turns_T1 = torch.arange(first_token, first_token + len(experts_TK), device=self._device)[:, None]
        return self._table_EC[experts_TK, turns_T1 % self._num_copies_E[experts_TK]]

    def _tabulate(self) -> None:
        copies_of: list[list[int]] = [[] for _ in range(self._num_experts)]
        for physical, expert in enumerate(self.placement):
            copies_of[expert].append(physical)
        assert all(copies_of), "an expert is nowhere"
        most = max(map(len, copies_of))
        rows = [copies + copies[:1] * (most - len(copies)) for copies in copies_of]
        self._table_EC = torch.tensor(rows, device=self._device)
        self._num_copies_E = torch.tensor(list(map(len, copies_of)), device=self._device)


class ExpertWeights(Protocol):
    """One parameter of all of a rank's experts, however it is laid out."""

    def read(self, slots: Sequence[int]) -> Tensor:
        """That of these experts: [slots, ...], of the same form on every rank."""

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        """Have that of these experts become `rows`."""


class PlainWeights:
    """A tensor [S, ...]."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def read(self, slots: Sequence[int]) -> Tensor:
        """A copy."""
        return self._weight[self._index(slots)]

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        """In place."""
        self._weight.index_copy_(0, self._index(slots), rows)

    def _index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self._weight.device)


class _Move(NamedTuple):
    """One physical expert that is to become another, and where that is taken from."""

    source_rank: int
    source_slot: int
    target_rank: int
    target_slot: int


def exchange(weights: Sequence[ExpertWeights], old: Sequence[int], new: Sequence[int], group: Group) -> None:
    """Have every rank's physical experts become those of the new placement, in place.

    `weights` are all the parameters of one layer's experts on this rank. Each takes one `all_to_all` of
    `group`, the ranks that share the experts out, and memory for what this rank sends and receives of it: at most S
    experts and the redundant ones, and S more. All ranks call it with the same placements. Raises what the group
    raises.
    """
    moves = _moves(old, new, group.size)
    sent = [move for move in moves if move.source_rank == group.rank]
    received = [move for move in moves if move.target_rank == group.rank]
    received.sort(key=lambda move: move.source_rank)  # as the exchange gives them; each rank's stay in order
    send_counts = [sum(move.target_rank == rank for move in sent) for rank in range(group.size)]
    receive_counts = [sum(move.source_rank == rank for move in received) for rank in range(group.size)]
    for weight in weights:
        rows = weight.read([move.source_slot for move in sent])
        weight.write([move.target_slot for move in received], group.all_to_all(rows, send_counts, receive_counts))


def _moves(old: Sequence[int], new: Sequence[int], num_ranks: int) -> list[_Move]:
    """By target. A rank takes from itself what it has; the other ranks with a copy take turns in giving it."""
    share = len(new) // num_ranks
    holders: dict[int, list[int]] = {}
    for physical, expert in enumerate(old):
        holders.setdefault(expert, []).append(physical)
    moves = []
    for physical, expert in enumerate(new):
        if old[physical] == expert:
            continue
        target_rank, target_slot = divmod(physical, share)
        own = [holder for holder in holders[expert] if holder // share == target_rank]
        source = own[0] if own else holders[expert][physical % len(holders[expert])]
        moves.append(_Move(*divmod(source, share), target_rank, target_slot))
    return moves
