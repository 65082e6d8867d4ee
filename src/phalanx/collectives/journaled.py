"""A group whose every collective is noted before it is issued: in the rank's journal, and in the digest of its step.

The journal also has when a collective was over: when the call has returned. With NCCL, the work was given to the GPU by
then. If the ranks are to agree on each collective, they do so after it was noted. What goes into a graph is in the
journal as captured, and counts for nothing else; each replay of the graph counts as one collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from phalanx.collectives.agreement import Agreement
from phalanx.collectives.descriptor import CollectiveRecord, Descriptor, Operation, dtype_name
from phalanx.collectives.group import Group
from phalanx.collectives.row_counts import RowCounts
from phalanx.ledger.journal import GroupJournal, NoJournal
from phalanx.ledger.step_digests import StepDigests

P = ParamSpec("P")
T = TypeVar("T")

_MAX_KNOWN = 4096
# Shapes vary with the number of tokens in a step; this is more than there are in a while of serving.


class JournaledGroup:
    """A `Group` around another one. Arguments are checked before anything is noted: what is, counts for the peers."""

    def __init__(
        self,
        group: Group,
        journal: GroupJournal | NoJournal,
        index: int = 0,
        digests: StepDigests | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """`index`: of the group, in the rank's digests."""
        self.name = group.name
        self.rank = group.rank
        self.size = group.size
        self._group = group
        self._journal = journal
        self._index = index
        self._digests = digests
        self._agreement = agreement
        self._sequence = 0
        self._known: dict[tuple[Operation, torch.dtype, torch.Size, int], Descriptor] = {}
        self._barrier = Descriptor("barrier")
        self._captured: list[Descriptor] | None = None

    @property
    def last(self) -> CollectiveRecord | None:
        return self._group.last

    @property
    def num_noted(self) -> int:
        """The sequence number of the newest collective in the journal. What a graph has captured is not counted."""
        return self._sequence

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._carry_out(self._described("all_reduce", x.dtype, x.shape, 0), self._group.all_reduce, x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        assert -x.dim() <= dim < x.dim(), dim
        described = self._described("all_gather", x.dtype, x.shape, dim % x.dim())
        return self._carry_out(described, self._group.all_gather, x, dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, x.shape
        return self._carry_out(self._described("reduce_scatter", x.dtype, x.shape, 0), self._group.reduce_scatter, x)

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        RowCounts(send_counts, receive_counts).check(len(x), self.rank, self.size)
        described = self._described("all_to_all", x.dtype, x.shape[1:], 0)  # numbers of rows may differ between ranks
        return self._carry_out(described, self._group.all_to_all, x, send_counts, receive_counts)

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert 0 <= src < self.size, src
        return self._carry_out(self._described("broadcast", x.dtype, x.shape, src), self._group.broadcast, x, src)

    def barrier(self) -> None:
        self._carry_out(self._barrier, self._group.barrier)

    def close(self) -> None:
        with ExitStack() as leaving:
            if self._agreement is not None:
                leaving.callback(self._agreement.close)
            leaving.callback(self._group.close)

    @contextmanager
    def capturing(self) -> Iterator[list[Descriptor]]:
        """What is issued meanwhile goes into a graph; gives the list that it is noted in."""
        captured = self._captured = []
        try:
            yield captured
        finally:
            self._captured = None

    @contextmanager
    def replaying(self, graph: Descriptor) -> Iterator[None]:
        """Meanwhile a graph is given to the device, with collectives of this group."""
        self._note(graph)
        try:
            yield
        except BaseException:
            self._journal.failed()
            raise
        self._journal.done()

    def _described(self, operation: Operation, dtype: torch.dtype, shape: torch.Size, argument: int) -> Descriptor:
        key = (operation, dtype, shape, argument)
        descriptor = self._known.get(key)
        if descriptor is None:
            if len(self._known) == _MAX_KNOWN:
                self._known.clear()
            descriptor = self._known[key] = Descriptor(operation, dtype_name(dtype), tuple(shape), argument)
        return descriptor

    def _carry_out(self, descriptor: Descriptor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Note it, take part in it, and note that it is over."""
        self._note(descriptor)
        try:
            result = call(*args, **kwargs)
        except BaseException:
            self._journal.failed()
            raise
        self._journal.done()
        return result

    def _note(self, descriptor: Descriptor) -> None:
        if self._captured is not None:
            self._captured.append(descriptor)
            self._journal.note_captured(len(self._captured), descriptor.digest, descriptor.__str__)
            return
        self._sequence += 1
        self._journal.issue(self._sequence, descriptor.digest, descriptor.__str__)
        if self._digests is not None:
            self._digests.fold(self._index, descriptor.digest)
        if self._agreement is not None:
            self._agree(self._agreement, descriptor)

    def _agree(self, agreement: Agreement, descriptor: Descriptor) -> None:
        try:
            agreement.agree(descriptor)
        except BaseException:  # whatever ends it, as an interrupt does: it goes on
            self._journal.failed()
            raise


class CapturedCollectives:
    """The collectives of one graph, over several groups."""

    def __init__(self, groups: Sequence[JournaledGroup]) -> None:
        """Of `groups`; others are in no journal."""
        self._groups = groups
        self._replayed: list[tuple[JournaledGroup, Descriptor]] = []

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Meanwhile the graph is made."""
        with ExitStack() as stack:
            captured = [stack.enter_context(group.capturing()) for group in self._groups]
            yield
        self._replayed = [
            (group, Descriptor.of_graph(of_group))
            for group, of_group in zip(self._groups, captured, strict=True)
            if of_group
        ]

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Meanwhile the graph is given to the device."""
        with ExitStack() as stack:
            for group, graph in self._replayed:
                stack.enter_context(group.replaying(graph))
            yield
