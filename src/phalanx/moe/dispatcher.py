"""How tokens get to the ranks that have their experts, and what the experts make of them back.

Experts are shared out to all ranks of a stage, of all replicas. Each dispatcher has exactly one sequence of collectives
for the numbers of tokens that the replicas have in a step, which all ranks are told (invariant 1): whatever the router
says, and if no token at all is for a rank's experts. The experts here are physical ones: where an expert has copies,
it is settled before which of them a token goes to (copies.py).

Shape suffixes: T this replica's tokens, K experts of a token, N tokens that came to this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.topology.sharding import Span, split

NOWHERE = -1
"""In place of an expert: the token is none, or does not go to so many."""


class Dispatched(NamedTuple):
    """Tokens that came to a rank."""

    hidden_ND: Tensor
    experts_NK: Tensor
    """Numbers of physical experts, of any rank, or NOWHERE."""
    weights_NK: Tensor
    """float32"""
    way_back: Any
    """What `combine` needs to know."""


class Dispatcher(Protocol):
    """For the use of one thread. All ranks of a stage call the same methods in the same order."""

    def begin(self, num_tokens: Sequence[int]) -> None:
        """A step in which each replica has so many tokens, at least one."""

    @property
    def first_token(self) -> int:
        """The place of this replica's first token among the tokens of all replicas in this step."""

    def dispatch(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        """Give this replica's tokens away; gives those that came here. All ranks of a replica have the same ones."""

    def combine(self, dispatched: Dispatched, out_ND: Tensor) -> Tensor:
        """From what this rank's experts add to each token that came to what all experts add to each of this replica's.

        [T, D], the same on every rank of the replica.
        """


class AllGatherReduceScatter:
    """Every rank gets the tokens of all replicas; what its experts add goes back to the replicas, summed on the way."""

    def __init__(self, peers: Group, shared: Group) -> None:
        """`peers`: the ranks with this rank's tp_rank, by replica. `shared`: the ranks of this replica's stage."""
        self._peers = peers
        self._shared = shared
        self._num_tokens: tuple[int, ...] = ()

    def begin(self, num_tokens: Sequence[int]) -> None:
        self._num_tokens = tuple(num_tokens)

    @property
    def first_token(self) -> int:
        return sum(self._num_tokens[: self._peers.rank])

    def dispatch(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        num_tokens, most = len(hidden_TD), max(self._num_tokens)
        assert num_tokens == self._num_tokens[self._peers.rank]
        if self._peers.size == 1:
            return Dispatched(hidden_TD, experts_TK, weights_TK.float(), num_tokens)
        routes_TR = _pack(experts_TK, weights_TK)
        if num_tokens < most:
            hidden_TD = _padded(hidden_TD, most, 0)
            routes_TR = _padded(routes_TR, most, NOWHERE)
        hidden_ND = self._peers.all_gather(hidden_TD.contiguous(), dim=0)
        experts_NK, weights_NK = _unpack(self._peers.all_gather(routes_TR, dim=0))
        return Dispatched(hidden_ND, experts_NK, weights_NK, num_tokens)

    def combine(self, dispatched: Dispatched, out_ND: Tensor) -> Tensor:
        if self._peers.size > 1:
            out_ND = self._peers.reduce_scatter(out_ND)[: dispatched.way_back]
        return self._shared.all_reduce(out_ND)


class AllToAll:
    """Each token goes only to the ranks that have its experts, once to each; what they add comes back and is summed.

    The ranks of a replica, which all have its tokens, share them out among themselves for this.
    """

    def __init__(self, experts: Group, shared: Group, num_experts: int) -> None:
        """`experts`: all ranks of the stage. `shared`: those of this replica. `num_experts`: physical ones."""
        self._experts = experts
        self._shared = shared
        spans = [split(num_experts, experts.size, rank) for rank in range(experts.size)]
        self._owner_E = torch.tensor([rank for rank, span in enumerate(spans) for _ in range(span.size)])
        self._num_tokens: tuple[int, ...] = ()

    def begin(self, num_tokens: Sequence[int]) -> None:
        self._num_tokens = tuple(num_tokens)

    @property
    def first_token(self) -> int:
        return sum(self._num_tokens[: self._experts.rank // self._shared.size])

    def dispatch(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Dispatched:
        num_tokens = len(hidden_TD)
        mine = self._share(num_tokens)
        self._owner_E = self._owner_E.to(hidden_TD.device)
        owner_TK = self._owner_E[experts_TK[mine.start : mine.stop]]
        goes_RT = torch.stack([(owner_TK == rank).any(dim=1) for rank in range(self._experts.size)])
        rows_S = goes_RT.nonzero()[:, 1] + mine.start  # by rank, then by token
        sent = goes_RT.sum(dim=1)
        ones = [1] * self._experts.size
        received = self._experts.all_to_all(sent[:, None].int(), ones, ones)[:, 0].tolist()
        counts = _Counts(sent.tolist(), received)
        hidden_ND = self._experts.all_to_all(hidden_TD[rows_S], counts.sent, counts.received)
        routes_SR = _pack(experts_TK[rows_S], weights_TK[rows_S])
        experts_NK, weights_NK = _unpack(self._experts.all_to_all(routes_SR, counts.sent, counts.received))
        return Dispatched(hidden_ND, experts_NK, weights_NK, (counts, rows_S, num_tokens))

    def combine(self, dispatched: Dispatched, out_ND: Tensor) -> Tensor:
        counts, rows_S, num_tokens = dispatched.way_back
        out_SD = self._experts.all_to_all(out_ND, counts.received, counts.sent)
        size = -(-num_tokens // self._shared.size)
        out_TD = out_SD.new_zeros(size, out_SD.shape[1])
        out_TD.index_add_(0, rows_S - self._share(num_tokens).start, out_SD)
        return self._shared.all_gather(out_TD, dim=0)[:num_tokens]

    def _share(self, num_tokens: int) -> Span:
        """This rank's share of its replica's tokens: as many for each but the last, so that they can be gathered."""
        size = -(-num_tokens // self._shared.size)
        start = min(self._shared.rank * size, num_tokens)
        return Span(start, min(start + size, num_tokens))


class _Counts(NamedTuple):
    """Rows to and from each rank."""

    sent: list[int]
    received: list[int]


def _pack(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Experts and weights in one tensor, so that they travel together: [T, 2K], int32."""
    return torch.cat([experts_TK.int(), weights_TK.float().contiguous().view(torch.int32)], dim=1)


def _unpack(routes_NR: Tensor) -> tuple[Tensor, Tensor]:
    experts_NK, weights_NK = routes_NR.chunk(2, dim=1)
    return experts_NK, weights_NK.contiguous().view(torch.float32)


def _padded(x_TX: Tensor, num_rows: int, value: int) -> Tensor:
    return torch.cat([x_TX, x_TX.new_full((num_rows - len(x_TX), x_TX.shape[1]), value)])
