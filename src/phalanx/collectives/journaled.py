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
from phalanx.collectives.descriptor import CollectiveRecord, Descriptor, Operation, described
from phalanx.collectives.group import Group
from phalanx.collectives.row_counts import RowCounts
from phalanx.ledger.group_notes import GroupNotes

P = ParamSpec("P")
T = TypeVar("T")

_MAX_KNOWN = 4096
# Shapes vary with the number of tokens in a step; this is more than there are in a while of serving.


class JournaledGroup:
    """A `Group` around another one. Arguments are checked before anything is noted: what is, counts for the peers."""

    def __init__(self, group: Group, notes: GroupNotes, agreement: Agreement | None = None) -> None:
        self.name = group.name
        self.rank = group.rank
        self.size = group.size
        self._group = group
        self._notes = notes
        self._agreement = agreement
        self._issue: Callable[[Descriptor], None] = notes.issue if agreement is None else self._agree
        self._done = notes.done
        self._known: dict[tuple[Operation, torch.dtype, torch.Size, int], Descriptor] = {}
        self._barrier = Descriptor("barrier")
        notes.explain(self._barrier)

    @property
    def last(self) -> CollectiveRecord | None:
        return self._group.last

    @property
    def num_noted(self) -> int:
        """The sequence number of the newest collective in the journal. What a graph has captured is not counted."""
        return self._notes.sequence

    def all_reduce(self, x: Tensor) -> Tensor:
        """As `_carry_out` would do it, with fewer calls: layers wait for nothing as often."""
        self._issue(self._described("all_reduce", x.dtype, x.shape, 0))
        try:
            self._group.all_reduce(x)
        except BaseException:
            self._notes.failed()
            raise
        self._done()
        return x

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
        captured: list[Descriptor] = []

        def note(descriptor: Descriptor) -> None:
            captured.append(descriptor)
            self._notes.note_captured(len(captured), descriptor)

        issue, done = self._issue, self._done
        self._issue, self._done = note, _nothing
        try:
            yield captured
        finally:
            self._issue, self._done = issue, done

    @contextmanager
    def replaying(self, graph: Descriptor) -> Iterator[None]:
        """Meanwhile a graph is given to the device, with collectives of this group."""
        self._notes.explain(graph)
        self._issue(graph)
        try:
            yield
        except BaseException:
            self._notes.failed()
            raise
        self._done()

    def _described(self, operation: Operation, dtype: torch.dtype, shape: torch.Size, argument: int) -> Descriptor:
        key = (operation, dtype, shape, argument)
        return self._known.get(key) or self._describe(key)

    def _describe(self, key: tuple[Operation, torch.dtype, torch.Size, int]) -> Descriptor:
        if len(self._known) == _MAX_KNOWN:
            self._known.clear()
        operation, dtype, shape, argument = key
        descriptor = self._known[key] = described(operation, dtype, shape, argument)
        self._notes.explain(descriptor)
        return descriptor

    def _carry_out(self, descriptor: Descriptor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Note it, take part in it, and note that it is over."""
        self._issue(descriptor)
        try:
            result = call(*args, **kwargs)
        except BaseException:
            self._notes.failed()
            raise
        self._done()
        return result

    def _agree(self, descriptor: Descriptor) -> None:
        """Note it, and take part in it if the peers are about to do the same."""
        assert self._agreement is not None
        self._notes.issue(descriptor)
        try:
            self._agreement.agree(descriptor)
        except BaseException:  # whatever ends it, as an interrupt does: it goes on
            self._notes.failed()
            raise


def _nothing() -> None:
    pass


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
