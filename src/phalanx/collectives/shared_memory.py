"""Collectives between CPU ranks of one host, through one shared segment.

A tensor that fits is copied into this rank's slot, the ranks meet (`Lockstep.arrive`), and each reads all slots: one
meeting, no system call while peers are awake. What is larger than a slot goes in chunks. A large all_reduce of more
than two ranks has two halves a chunk: every rank sums its own part of the chunk out of all slots into its own slot,
then all copy the sums (reduce-scatter and all-gather, as in Rabenseifner, "Optimization of Collective Reduction
Operations", 2004), so that the additions are shared.

In a reduce_scatter and an all_to_all a rank's slot holds only what is for its peers, and each reads its own share. The
rows of an all_to_all lie there in the order of the ring, from the rank after this one on: so every peer has something
to read in each of several turns if the rows are spread evenly. How many turns there are, the ranks learn at the first.

Sums are taken in rank order; bfloat16 and float16 are added in float32 and rounded once. So the result is bitwise the
same on every rank and in every run.

Shape suffixes: N elements of a chunk, P elements of one rank's part of it, S ranks, B bytes. Names without one have
the caller's shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.collectives.descriptor import CollectiveRecord, Descriptor, Operation, described
from phalanx.collectives.lockstep import Lockstep
from phalanx.collectives.row_counts import RowCounts
from phalanx.collectives.spec import GroupSpec
from phalanx.collectives.sums import ROUNDED_ONCE, add_up

# Parts start on cache lines of their own, for every dtype.
_PART_ALIGNMENT = 64
# Shapes vary with the number of tokens in a step; this is more than there are in a while of serving.
_MAX_PLANS = 1024


_ByParity = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""A view for each parity and rank."""


class _Plan(NamedTuple):
    """One operation on one dtype and shape."""

    descriptor: Descriptor
    own: tuple[Tensor, Tensor] | None  # None: goes in chunks, as the larger ones and those that are shared out do
    slots: _ByParity
    accumulator: Tensor | None


class _SharedSum(NamedTuple):
    """The sum of one chunk, shared between the ranks."""

    own: tuple[Tensor, Tensor]
    addends_P: _ByParity  # this rank's part, in each rank's slot
    sums_P: _ByParity  # each rank's part, in its own slot
    sizes_P: list[int]
    accumulator: Tensor | None


class _ScatteredSum(NamedTuple):
    """The sum of one chunk, of which each rank gets its own part."""

    own: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    """For each parity: the parts, in this rank's slot, for the ranks before it and for those after it."""
    addends_P: _ByParity
    """This rank's part in each rank's slot. Its own is in none: any view stands there."""
    accumulator: Tensor | None


class _Run(NamedTuple):
    """What one peer sends to this rank in an all_to_all, in bytes: from where to where of all that it puts out."""

    peer: int
    start: int
    stop: int


class SharedMemoryGroup:
    """A `Group` of CPU ranks of one host.

    Whatever interrupts an operation, be it Ctrl-C, ends the group: the peers would wait for the rest of it.
    """

    def __init__(self, spec: GroupSpec, rank: int) -> None:
        """Join; blocks until all ranks have. Raises what `Lockstep` raises."""
        self.name = spec.name
        self.rank = spec.ranks.index(rank)
        self.size = spec.size
        self._lockstep = Lockstep(spec, rank)
        self._slot_bytes = spec.slot_bytes
        self._alone_bytes = spec.alone_bytes
        self._runs_ahead = spec.runs_ahead
        self._plans: dict[tuple[Operation, torch.dtype, torch.Size, int], _Plan] = {}
        self._shared_sums: dict[tuple[torch.dtype, int], _SharedSum] = {}
        self._scattered_sums: dict[tuple[torch.dtype, int], _ScatteredSum] = {}
        self._barrier = Descriptor("barrier")
        # Views that are made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._memory = torch.frombuffer(self._lockstep.memory, dtype=torch.uint8)
            self._scratch = torch.empty(spec.slot_bytes // 2, dtype=torch.float32)

    @property
    def last(self) -> CollectiveRecord | None:
        return self._lockstep.last

    def all_reduce(self, x: Tensor) -> Tensor:
        plan = self._plans.get(("all_reduce", x.dtype, x.shape, 0)) or self._make_plan("all_reduce", x, 0)
        try:
            self._lockstep.issue(plan.descriptor)
            if plan.own is None:
                self._all_reduce_in_chunks(x)
            else:
                plan.own[self._lockstep.next_parity].copy_(x)
                slots = plan.slots[self._lockstep.arrive()]
                if self.size == 2:
                    x.add_(slots[1 - self.rank])  # the quickest; two addends have no order
                else:
                    add_up(slots, x, plan.accumulator)
        except BaseException as error:
            self._lockstep.abandon(error)
            raise
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        assert -x.dim() <= dim < x.dim(), dim
        dim %= x.dim()
        plan = self._plans.get(("all_gather", x.dtype, x.shape, dim)) or self._make_plan("all_gather", x, dim)
        try:
            self._lockstep.issue(plan.descriptor)
            if plan.own is None:
                return self._all_gather_in_chunks(x, dim)
            plan.own[self._lockstep.next_parity].copy_(x)
            return torch.cat(plan.slots[self._lockstep.arrive()], dim)
        except BaseException as error:
            self._lockstep.abandon(error)
            raise

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, x.shape
        plan = self._plans.get(("reduce_scatter", x.dtype, x.shape, 0)) or self._make_plan("reduce_scatter", x, 0)
        try:
            self._lockstep.issue(plan.descriptor)
            x_SP = x.reshape(self.size, x.numel() // self.size)
            sum_P = x_SP.new_empty(x_SP.shape[1])
            num_P = self._slot_bytes // (x.element_size() * (self.size - 1))
            if len(sum_P) <= num_P:
                self._sum_own_part(x_SP, sum_P)
            else:
                for chunk_SP, chunk_P in zip(torch.split(x_SP, num_P, 1), torch.split(sum_P, num_P), strict=True):
                    self._sum_own_part(chunk_SP, chunk_P)
            return sum_P.view(x.shape[0] // self.size, *x.shape[1:])
        except BaseException as error:
            self._lockstep.abandon(error)
            raise

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        counts = RowCounts(send_counts, receive_counts)
        counts.check(len(x), self.rank, self.size)
        assert x.device.type == "cpu", x.device
        try:
            self._lockstep.issue(described("all_to_all", x.dtype, x.shape[1:]))
            received_B = self._exchange_rows(_as_bytes(x), counts, prod(x.shape[1:]) * x.element_size())
            return received_B.view(x.dtype).view(sum(receive_counts), *x.shape[1:])
        except BaseException as error:
            self._lockstep.abandon(error)
            raise

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert 0 <= src < self.size, src
        plan = self._plans.get(("broadcast", x.dtype, x.shape, src)) or self._make_plan("broadcast", x, src)
        try:
            self._lockstep.issue(plan.descriptor)
            if plan.own is None:
                self._broadcast_in_chunks(x, src)
            else:
                if src == self.rank:
                    plan.own[self._lockstep.next_parity].copy_(x)
                    self._hand_out()
                else:
                    x.copy_(plan.slots[self._lockstep.arrive()][src])
        except BaseException as error:
            self._lockstep.abandon(error)
            raise
        return x

    def barrier(self) -> None:
        try:
            self._lockstep.issue(self._barrier)
            self._lockstep.arrive()
        except BaseException as error:
            self._lockstep.abandon(error)
            raise

    def close(self) -> None:
        self._plans.clear()
        self._shared_sums.clear()
        self._scattered_sums.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._lockstep.close()

    def _all_reduce_in_chunks(self, x: Tensor) -> None:
        flat = x.reshape(-1)
        for chunk_N in self._chunks(flat):
            if self.size == 2:
                parity = self._lockstep.next_parity
                self._slot(self.rank, parity, chunk_N).copy_(chunk_N)
                self._lockstep.arrive()
                chunk_N.add_(self._slot(1 - self.rank, parity, chunk_N))
            else:
                self._all_reduce_shared(chunk_N)
        if flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view_as(x))

    def _all_reduce_shared(self, chunk_N: Tensor) -> None:
        key = (chunk_N.dtype, chunk_N.numel())
        plan = self._shared_sums.get(key) or self._share_sum(chunk_N)
        plan.own[self._lockstep.next_parity].copy_(chunk_N)
        parity = self._lockstep.arrive()
        parts_P = torch.split(chunk_N, plan.sizes_P)
        sums_P = plan.sums_P[parity]
        add_up(plan.addends_P[parity], parts_P[self.rank], plan.accumulator)
        # Nobody else reads this rank's part of this rank's slot, so the sum may take its place.
        sums_P[self.rank].copy_(parts_P[self.rank])
        self._lockstep.mark_finished()
        self._lockstep.await_finished()
        for rank, part_P in enumerate(parts_P):
            if rank != self.rank:
                part_P.copy_(sums_P[rank])

    def _all_gather_in_chunks(self, x: Tensor, dim: int) -> Tensor:
        gathered = torch.empty(self.size, x.numel(), dtype=x.dtype)
        start = 0
        for chunk_N in self._chunks(x.reshape(-1)):
            parity = self._lockstep.next_parity
            self._slot(self.rank, parity, chunk_N).copy_(chunk_N)
            self._lockstep.arrive()
            for rank in range(self.size):
                gathered[rank, start : start + chunk_N.numel()].copy_(self._slot(rank, parity, chunk_N))
            start += chunk_N.numel()
        return torch.cat(gathered.view(self.size, *x.shape).unbind(), dim)

    def _sum_own_part(self, chunk_SP: Tensor, out_P: Tensor) -> None:
        key = (out_P.dtype, out_P.numel())
        plan = self._scattered_sums.get(key) or self._scatter_sum(out_P)
        before_SP, after_SP = plan.own[self._lockstep.next_parity]
        if self.rank > 0:
            before_SP.copy_(chunk_SP[: self.rank])
        if self.rank < self.size - 1:
            after_SP.copy_(chunk_SP[self.rank + 1 :])
        addends_P = list(plan.addends_P[self._lockstep.arrive()])
        addends_P[self.rank] = chunk_SP[self.rank]
        add_up(addends_P, out_P, plan.accumulator)

    def _exchange_rows(self, sent_B: Tensor, counts: RowCounts, row_bytes: int) -> Tensor:
        bounds = [row * row_bytes for row in accumulate(counts.send, initial=0)]
        before_B, kept_B, after_B = sent_B.tensor_split(bounds[self.rank : self.rank + 2])
        outgoing = after_B, before_B
        parity = self._lockstep.next_parity
        self._put_out(outgoing, 0)
        all_counts = self._lockstep.arrive_with_rows(counts)
        runs_B = [self._run(peer, of_peer.send, row_bytes) for peer, of_peer in enumerate(all_counts)]
        del runs_B[self.rank]
        num_B = max(sum(send) - send[rank] for rank, (send, _) in enumerate(all_counts)) * row_bytes
        if num_B > self._slot_bytes:
            return self._take_in_turns(outgoing, kept_B, runs_B, num_B, parity)
        earlier, later = runs_B[: self.rank], runs_B[self.rank :]
        return torch.cat((*self._taken(earlier, parity), kept_B, *self._taken(later, parity)))

    def _take_in_turns(
        self, outgoing: tuple[Tensor, Tensor], kept_B: Tensor, runs_B: list[_Run], num_B: int, parity: int
    ) -> Tensor:
        """What an all_to_all gives, from its first turn on, of `parity`, at which all have met."""
        sizes = [stop - start for _, start, stop in runs_B]
        sizes.insert(self.rank, len(kept_B))
        received_B = kept_B.new_empty(sum(sizes))
        parts_B = torch.split(received_B, sizes)
        parts_B[self.rank].copy_(kept_B)
        for begin in range(0, num_B, self._slot_bytes):
            if begin:
                self._put_out(outgoing, begin)
                parity = self._lockstep.arrive()
            for peer, start, stop in runs_B:
                low, high = max(start, begin), min(stop, begin + self._slot_bytes)
                if low < high:
                    taken_B = self._slot_part(peer, parity, low - begin, high - begin)
                    parts_B[peer][low - start : high - start].copy_(taken_B)
        return received_B

    def _run(self, peer: int, send_counts: Sequence[int], row_bytes: int) -> _Run:
        """Where `peer`, which begins with the rank after it, has the rows for this one."""
        if peer < self.rank:
            num_before = sum(send_counts[peer + 1 : self.rank])
        else:
            num_before = sum(send_counts[peer + 1 :]) + sum(send_counts[: self.rank])
        return _Run(peer, num_before * row_bytes, (num_before + send_counts[self.rank]) * row_bytes)

    def _put_out(self, outgoing: tuple[Tensor, Tensor], begin: int) -> None:
        """Fill this rank's slot with what comes from `begin` on in the two tensors, seen as one."""
        at = self._lockstep.layout.slot(self.rank, self._lockstep.next_parity)
        room = self._slot_bytes
        for part_B in outgoing:
            taken_B = part_B[begin : begin + room]
            num_B = len(taken_B)
            if num_B:
                self._memory[at : at + num_B].copy_(taken_B)
            begin = max(begin - len(part_B), 0)
            at += num_B
            room -= num_B

    def _taken(self, runs_B: list[_Run], parity: int) -> list[Tensor]:
        return [self._slot_part(peer, parity, start, stop) for peer, start, stop in runs_B if start < stop]

    def _slot_part(self, rank: int, parity: int, start: int, stop: int) -> Tensor:
        at = self._lockstep.layout.slot(rank, parity)
        return self._memory[at + start : at + stop]

    def _broadcast_in_chunks(self, x: Tensor, src: int) -> None:
        flat = x.reshape(-1)
        for chunk_N in self._chunks(flat):
            self._lockstep.settle()
            slot_N = self._slot(src, self._lockstep.next_parity, chunk_N)
            if src == self.rank:
                slot_N.copy_(chunk_N)
                self._hand_out()
            else:
                self._lockstep.arrive()
                chunk_N.copy_(slot_N)
        if src != self.rank and flat.data_ptr() != x.data_ptr():
            x.copy_(flat.view_as(x))

    def _hand_out(self) -> None:
        """Let the peers read what this rank has put into its slot."""
        if self._runs_ahead:
            self._lockstep.announce()
        else:
            self._lockstep.arrive()

    def _chunks(self, flat: Tensor) -> Iterator[Tensor]:
        num_N = self._slot_bytes // flat.element_size()
        return (flat[start : start + num_N] for start in range(0, flat.numel(), num_N))

    def _share_sum(self, chunk_N: Tensor) -> _SharedSum:
        """Plan the sum of a chunk of this dtype and size: who sums up what. The last ranks may have nothing."""
        num_N = chunk_N.numel()
        num_P = -(-num_N // (self.size * _PART_ALIGNMENT)) * _PART_ALIGNMENT
        bounds = [min(rank * num_P, num_N) for rank in range(self.size + 1)]
        parts = [slice(*bound) for bound in pairwise(bounds)]
        with torch.inference_mode(False):
            slots = self._slots(chunk_N)
            even, odd = (tuple(slot_N[parts[self.rank]] for slot_N in of_parity) for of_parity in slots)
            addends_P = even, odd
            even, odd = (tuple(map(Tensor.__getitem__, of_parity, parts)) for of_parity in slots)
            sums_P = even, odd
        own = slots[0][self.rank], slots[1][self.rank]
        sizes_P = [part.stop - part.start for part in parts]
        plan = _SharedSum(own, addends_P, sums_P, sizes_P, self._accumulator(addends_P[0][0]))
        if len(self._shared_sums) >= _MAX_PLANS:
            self._shared_sums.clear()
        self._shared_sums[chunk_N.dtype, num_N] = plan
        return plan

    def _scatter_sum(self, out_P: Tensor) -> _ScatteredSum:
        """Plan the sum of a chunk of which every rank gets a part of this dtype and size."""
        num_P = out_P.numel()
        like_SP = out_P.new_empty(self.size - 1, num_P)
        with torch.inference_mode(False):
            slots = self._slots(like_SP)
            owns = [of_parity[self.rank].tensor_split((self.rank,)) for of_parity in slots]
            # A slot has no part for its own rank, so the later ones move up.
            even, odd = (
                tuple(
                    slot_SP[min(self.rank - (rank < self.rank), self.size - 2)]
                    for rank, slot_SP in enumerate(of_parity)
                )
                for of_parity in slots
            )
        own = (owns[0][0], owns[0][1]), (owns[1][0], owns[1][1])
        plan = _ScatteredSum(own, (even, odd), self._accumulator(out_P))
        if len(self._scattered_sums) >= _MAX_PLANS:
            self._scattered_sums.clear()
        self._scattered_sums[out_P.dtype, num_P] = plan
        return plan

    def _slot(self, rank: int, parity: int, like: Tensor) -> Tensor:
        """A view of a slot with the dtype and shape of `like`, which fits."""
        start = self._lockstep.layout.slot(rank, parity)
        return self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def _slots(self, like: Tensor) -> _ByParity:
        even, odd = (tuple(self._slot(rank, parity, like) for rank in range(self.size)) for parity in (0, 1))
        return even, odd

    def _accumulator(self, like: Tensor) -> Tensor | None:
        if self.size == 2 or like.dtype not in ROUNDED_ONCE:
            return None
        return self._scratch[: like.numel()].view(like.shape)

    def _make_plan(self, operation: Operation, x: Tensor, argument: int) -> _Plan:
        self._lockstep.check()
        assert x.device.type == "cpu", x.device
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        descriptor = described(operation, x.dtype, x.shape, argument)
        limit_bytes = self._alone_bytes if operation == "all_reduce" else self._slot_bytes
        if x.nbytes > limit_bytes or operation == "reduce_scatter":
            plan = _Plan(descriptor, None, ((), ()), None)
        else:
            with torch.inference_mode(False):
                slots = self._slots(x)
                own = slots[0][self.rank], slots[1][self.rank]
                plan = _Plan(descriptor, own, slots, self._accumulator(x))
        self._plans[operation, x.dtype, x.shape, argument] = plan
        return plan


def _as_bytes(x: Tensor) -> Tensor:
    """The numbers of `x`, row by row."""
    return x.reshape(-1).view(torch.uint8)
