"""How many rows go from whom to whom in an all_to_all. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from phalanx.collectives.layout import Layout

_WORD_BYTES = 8


class RowCounts(NamedTuple):
    """What one rank sends to each rank of the group and expects from each, itself included."""

    send: Sequence[int]
    receive: Sequence[int]

    def check(self, num_rows: int, rank: int, size: int) -> None:
        """Assert that they fit the rows that `rank` has, and that it expects of itself what it sends to itself."""
        assert len(self.send) == len(self.receive) == size, self
        assert min(*self.send, *self.receive) >= 0, self
        assert sum(self.send) == num_rows, f"{self} of {num_rows} rows"
        assert self.send[rank] == self.receive[rank], f"{self} on rank {rank}"


class Disagreement(NamedTuple):
    """A sender and a receiver, by their places in the group, that count differently."""

    sender: int
    receiver: int
    num_sent: int
    num_expected: int

    def describe(self, ranks: Sequence[int]) -> str:
        """`ranks`: the global rank at each place."""
        return (
            f"rank {ranks[self.sender]} sends {self.num_sent} rows to rank {ranks[self.receiver]}, "
            f"which expects {self.num_expected}"
        )


def compare(mine: int, ours: RowCounts, peer: int, sent: int, expected: int) -> Disagreement | None:
    """Whether a peer that sends `sent` rows to place `mine` and expects `expected` from it counts as `ours` does."""
    if sent != ours.receive[peer]:
        return Disagreement(peer, mine, sent, ours.receive[peer])
    if expected != ours.send[peer]:
        return Disagreement(mine, peer, ours.send[peer], expected)
    return None


def compare_all(counts: Sequence[RowCounts]) -> Disagreement | None:
    """The first two of all ranks that count differently. `counts` has an entry for each rank."""
    if [tuple(of_rank.send) for of_rank in counts] == list(zip(*(of_rank.receive for of_rank in counts), strict=True)):
        return None
    return next(
        Disagreement(sender, receiver, num_sent, counts[receiver].receive[sender])
        for sender, of_rank in enumerate(counts)
        for receiver, num_sent in enumerate(of_rank.send)
        if num_sent != counts[receiver].receive[sender]
    )


class RowTable:
    """Where each rank of one host writes its counts, for its peers to read: see `Layout.counts`."""

    def __init__(self, words: memoryview, layout: Layout, seat: int) -> None:
        """`words`: the segment as 64-bit numbers."""
        self._words = words
        self._seat = seat
        self._size = layout.num_ranks
        self._entries = [
            [layout.counts(rank, parity) // _WORD_BYTES for rank in range(layout.num_ranks)] for parity in (0, 1)
        ]  # by parity and rank

    def write(self, parity: int, counts: RowCounts) -> None:
        """Make this rank's entry."""
        at = self._entries[parity][self._seat]
        self._words[at : at + 2 * self._size] = array("Q", (*counts.send, *counts.receive))

    def read(self, parity: int) -> list[RowCounts]:
        """The entries of all ranks."""
        words, size = self._words, self._size
        entries = (words[at : at + 2 * size].tolist() for at in self._entries[parity])
        return [RowCounts(entry[:size], entry[size:]) for entry in entries]
