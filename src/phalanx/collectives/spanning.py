"""Collectives between CPU ranks of several hosts, by messages from one rank to another that Gloo carries.

Every rank sends to every other one directly. A sum up to `_ALONE_BYTES` is one meeting: all get everybody's addend. A
larger one of more than two ranks has two: each rank sums up its own part, then all get the parts' sums (reduce-scatter
and all-gather, as in Rabenseifner, "Optimization of Collective Reduction Operations", 2004). Sums are taken in rank
order, bfloat16 and float16 in float32 and rounded once: the same bits on every rank, in every run, and wherever the
ranks are.

Not by Gloo's own collectives (torch 2.13): there the process of a rank that is sent more than it expects is ended by a
signal, one that is sent less goes on with what it has, and small sums take up to twice as long. Here a message is
tagged with its collective, so that ranks in different ones never take each other's data; both wait for their deadline.
In an all_to_all the ranks may count differently, so that there the number of rows is part of the tag, and two ranks
tell each other their counts, while the rows are on their way.

Data between hosts is not encrypted, as NCCL's is not.

Shape suffixes: N elements, P elements of one rank's part of them.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d

from phalanx.collectives.descriptor import CollectiveRecord, Descriptor, described
from phalanx.collectives.exchange import Exchange
from phalanx.collectives.exchange_store import ExchangeStore
from phalanx.collectives.remote_lockstep import RemoteLockstep
from phalanx.collectives.row_counts import RowCounts, compare
from phalanx.collectives.spec import GroupSpec
from phalanx.collectives.sums import ROUNDED_ONCE, add_up
from phalanx.errors import PhalanxError

# From here on half of the data is worth a second meeting.
_ALONE_BYTES = 64 * 1024
# Broadcasts of which the source need not know yet that they have arrived, in a group that runs ahead.
_MAX_AHEAD = 4
# Gloo gives each the whole time-out.
_CONNECT_TRIES = 5
_TAG_BITS = 31
_PHASES = 2
# Odd, so that counts of rows that differ give tags that do; the golden ratio's, so that they are far apart.
_TAGS_PER_ROW = 0x9E3779B1
# Where torch.distributed has its classes from; it passes on only some of them, and the stubs leave out more.
c10d: Any = _distributed_c10d


@dataclass(eq=False)
class _Transfer:
    """A message under way, and its memory, which must stay until it has arrived.

    `work` keeps the connections open, so whoever closes them takes it away: a traceback may hold the rest for long.
    """

    peer: int
    memory: Tensor
    work: Any


class SpanningGroup:
    """A `Group` of CPU ranks of several hosts."""

    def __init__(self, spec: GroupSpec, rank: int, exchange: Exchange) -> None:
        """Join; blocks until all ranks have. Raises what `RemoteLockstep` raises."""
        self.name = spec.name
        self.rank = spec.ranks.index(rank)
        self.size = spec.size
        self._peers = [peer for peer in range(spec.size) if peer != self.rank]
        self._timeout_s = spec.timeout_s
        self._max_ahead = _MAX_AHEAD if spec.runs_ahead else 0
        self._under_way: list[_Transfer] = []
        self._ahead: deque[_Transfer] = deque()
        self._backend: Any = None
        self._lockstep = RemoteLockstep(spec, rank, exchange)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._connect(spec, exchange)
            undo.pop_all()

    @property
    def last(self) -> CollectiveRecord | None:
        return self._lockstep.last

    def all_reduce(self, x: Tensor) -> Tensor:
        with self._collective(described("all_reduce", x.dtype, x.shape)) as tag:
            flat_N = x.reshape(-1)
            if x.nbytes <= _ALONE_BYTES or self.size == 2:
                self._sum_alone(flat_N, tag)
            else:
                self._sum_shared(flat_N, tag)
            if flat_N.data_ptr() != x.data_ptr():
                x.copy_(flat_N.view_as(x))
        return x

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        assert -x.dim() <= dim < x.dim(), dim
        dim %= x.dim()
        with self._collective(described("all_gather", x.dtype, x.shape, dim)) as tag:
            gathered = x.new_empty(self.size, *x.shape)
            gathered[self.rank].copy_(x)
            self._swap(dict.fromkeys(self._peers, gathered[self.rank]), dict(enumerate(gathered)), tag)
            return torch.cat(gathered.unbind(), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, x.shape
        with self._collective(described("reduce_scatter", x.dtype, x.shape)) as tag:
            parts = x.contiguous().tensor_split(self.size)
            return self._sum_own(parts, tag)

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        counts = RowCounts(send_counts, receive_counts)
        counts.check(len(x), self.rank, self.size)
        with self._collective(described("all_to_all", x.dtype, x.shape[1:])) as tag:
            received = x.new_empty(sum(receive_counts), *x.shape[1:])
            runs, sent_runs = (
                torch.split(received, list(receive_counts)),
                torch.split(x.contiguous(), list(send_counts)),
            )
            rows = self._start_rows(sent_runs, runs, tag + 1)
            self._agree_on(counts, tag)
            for transfer in rows:
                self._complete(transfer)
            runs[self.rank].copy_(sent_runs[self.rank])
        return received

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """As in `Group`. In a group that runs ahead the source may be `_MAX_AHEAD` broadcasts ahead of its peers.

        What is wrong with one of these shows in a later broadcast. So the source must not close such a group before it
        knows otherwise that all have arrived.
        """
        assert 0 <= src < self.size, src
        with self._collective(described("broadcast", x.dtype, x.shape, src)) as tag:
            if src == self.rank:
                # The caller may overwrite `x` as soon as this returns.
                sent = x.clone(memory_format=torch.contiguous_format) if self._max_ahead else x.contiguous()
                self._send_ahead(sent, tag)
            else:
                received = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
                self._complete(self._receive(received, src, tag))
                if received is not x:
                    x.copy_(received)
        return x

    def barrier(self) -> None:
        word = torch.zeros(self.size, 1, dtype=torch.uint8)
        with self._collective(Descriptor("barrier")) as tag:
            self._swap(dict.fromkeys(self._peers, word[self.rank]), dict(enumerate(word)), tag)

    def close(self) -> None:
        self._disconnect()
        self._lockstep.close()

    def _connect(self, spec: GroupSpec, exchange: Exchange) -> None:
        options = c10d.ProcessGroupGloo._Options()
        # The default is the address that the host's name resolves to: another interface, or none at all.
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=exchange.node_address)]
        options._timeout = timedelta(seconds=spec.join_timeout_s / _CONNECT_TRIES)
        # Kept: C++ would otherwise call methods of an object that Python has already let go.
        self._store = ExchangeStore(exchange, spec.name, spec.join_timeout_s)
        start = time.monotonic()
        try:
            self._backend = c10d.ProcessGroupGloo(self._store, self.rank, self.size, options)
        except PhalanxError:
            raise
        except (RuntimeError, TimeoutError) as error:
            raise self._lockstep.blame(_in_short(error), time.monotonic() - start) from error

    def _disconnect(self) -> None:
        """Close the connections: peers that wait for this rank are told so. Then nothing uses the memory any more."""
        self._backend = None
        for transfer in self._under_way:
            transfer.work = None
        self._under_way.clear()
        self._ahead.clear()

    @contextmanager
    def _collective(self, descriptor: Descriptor) -> Iterator[int]:
        """Gives the first of the collective's tags, one for each of its phases."""
        try:
            self._lockstep.issue(descriptor)
            yield (descriptor.digest + self._lockstep.sequence) * _PHASES % (1 << _TAG_BITS)
        except BaseException as error:
            self._disconnect()
            self._lockstep.abandon(error)
            raise

    def _sum_alone(self, flat_N: Tensor, tag: int) -> None:
        addends = [flat_N if rank == self.rank else torch.empty_like(flat_N) for rank in range(self.size)]
        self._swap(dict.fromkeys(self._peers, flat_N), dict(enumerate(addends)), tag)
        if self.size == 2:
            flat_N.add_(addends[1 - self.rank])  # the quickest; two addends have no order
        else:
            flat_N.copy_(_sum(addends))

    def _sum_shared(self, flat_N: Tensor, tag: int) -> None:
        parts_P = flat_N.tensor_split(self.size)
        own_P = parts_P[self.rank]
        own_P.copy_(self._sum_own(parts_P, tag))
        self._swap(dict.fromkeys(self._peers, own_P), dict(enumerate(parts_P)), tag + 1)

    def _sum_own(self, parts: Sequence[Tensor], tag: int) -> Tensor:
        """The sum of the ranks' parts for this rank; `parts` has what this rank brings for each."""
        own = parts[self.rank]
        addends = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.size)]
        self._swap(dict(enumerate(parts)), dict(enumerate(addends)), tag)
        return _sum(addends)

    def _start_rows(self, sent: Sequence[Tensor], received: Sequence[Tensor], tag: int) -> list[_Transfer]:
        """Begin to send each peer its rows, and to receive from each. Never blocks."""
        return [
            *(self._receive(received[p], p, _tag_of(tag, received[p])) for p in self._peers if received[p].nbytes),
            *(self._send(sent[p], p, _tag_of(tag, sent[p])) for p in self._peers if sent[p].nbytes),
        ]

    def _agree_on(self, counts: RowCounts, tag: int) -> None:
        """Tell every peer how many rows this rank has for it, and how many it expects, and compare."""
        told, heard = torch.tensor([counts.send, counts.receive]).T.contiguous(), torch.empty(self.size, 2).long()
        self._swap(dict(enumerate(told)), dict(enumerate(heard)), tag)
        for peer in self._peers:
            sent, expected = heard[peer].tolist()
            disagreement = compare(self.rank, counts, peer, sent, expected)
            if disagreement is not None:
                raise self._lockstep.refuse(disagreement)

    def _swap(self, sent: dict[int, Tensor], received: dict[int, Tensor], tag: int) -> None:
        """Send each peer what is meant for it and receive from each. Blocks until both are done."""
        receiving = [self._receive(received[peer], peer, tag) for peer in self._peers]
        sending = [self._send(sent[peer], peer, tag) for peer in self._peers]
        for transfer in (*receiving, *sending):
            self._complete(transfer)

    def _send_ahead(self, x: Tensor, tag: int) -> None:
        self._ahead += [self._send(x, peer, tag) for peer in self._peers]
        while len(self._ahead) > self._max_ahead * len(self._peers):
            self._complete(self._ahead.popleft())

    def _send(self, x: Tensor, peer: int, tag: int) -> _Transfer:
        with self._blaming(peer):
            transfer = _Transfer(peer, x, self._backend.send([_as_bytes(x)], peer, tag))
        self._under_way.append(transfer)
        return transfer

    def _receive(self, x: Tensor, peer: int, tag: int) -> _Transfer:
        with self._blaming(peer):
            transfer = _Transfer(peer, x, self._backend.recv([_as_bytes(x)], peer, tag))
        self._under_way.append(transfer)
        return transfer

    def _complete(self, transfer: _Transfer) -> None:
        with self._blaming(transfer.peer):
            transfer.work.wait(timedelta(seconds=self._timeout_s))
        self._under_way.remove(transfer)

    @contextmanager
    def _blaming(self, peer: int) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            waited_s = time.monotonic() - start
            self._disconnect()
            raise self._lockstep.blame(_in_short(error), waited_s, (peer,)) from error


def _tag_of(tag: int, rows: Tensor) -> int:
    """The tag of a message with so many rows, in the phase that `tag` begins."""
    return (tag + len(rows) * _TAGS_PER_ROW * _PHASES) % (1 << _TAG_BITS)


def _sum(addends: list[Tensor]) -> Tensor:
    out = torch.empty_like(addends[0])
    add_up(addends, out, out.float() if out.dtype in ROUNDED_ONCE else None)
    return out


def _in_short(error: Exception) -> str:
    """Without the place in Gloo's source, and without the advice that follows what happened."""
    return re.sub(r"\[/[^]]*\] ", "", str(error)).partition(". ")[0]


def _as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8)
