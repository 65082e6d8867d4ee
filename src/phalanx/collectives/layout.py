"""Where things stand in a group's shared segment. Pure arithmetic, in bytes from the segment's start.

    0       verdict: why the group has ended, 8 bytes, 0 while it lives
    64      awaited: one byte a rank, which says whom it sleeps for (that rank + 1, 0 when awake)
    128     one seat of 512 bytes a rank:
        +0    header of even turns    arrived turn, sequence number, descriptor
        +128  header of odd turns
        +256  finished turn: the second half of a turn that has two
        +320  joined, pid, start time
        +384  doorbell, 4 bytes
    counts  from the next line: for each rank and parity, 16 bytes for each rank of the group (see `RowTable`)
    data    from the next page: two slots a rank, for even and odd turns

What one rank writes while others read something else stands on a cache line of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.collectives.descriptor import DESCRIPTOR_BYTES

MAX_RANKS = 64
VERDICT = 0
AWAITED = 64
_SEATS = 128
_SEAT_BYTES = 512
_HEADER_BYTES = 128
_FINISHED = 256
_JOINED = 320
_BELL = 384
_COUNT_BYTES = 16
_LINE_BYTES = 64
_PAGE_BYTES = 4096

# Within a header, in bytes.
SEQUENCE = 8
DESCRIPTOR = 16
assert DESCRIPTOR + DESCRIPTOR_BYTES <= _HEADER_BYTES
assert AWAITED + MAX_RANKS <= _SEATS


@dataclass(frozen=True)
class Layout:
    """The segment of `num_ranks` ranks, with slots of `slot_bytes` (0: no data, headers only)."""

    num_ranks: int
    slot_bytes: int

    def __post_init__(self) -> None:
        assert 1 <= self.num_ranks <= MAX_RANKS, self.num_ranks
        assert self.slot_bytes % _PAGE_BYTES == 0, self.slot_bytes

    @property
    def size_bytes(self) -> int:
        return self.data + 2 * self.num_ranks * self.slot_bytes

    @property
    def data(self) -> int:
        return _up_to(self.counts(self.num_ranks, 0), _PAGE_BYTES)

    def header(self, rank: int, parity: int) -> int:
        return self._seat(rank) + parity * _HEADER_BYTES

    def finished(self, rank: int) -> int:
        return self._seat(rank) + _FINISHED

    def joined(self, rank: int) -> int:
        return self._seat(rank) + _JOINED

    def bell(self, rank: int) -> int:
        return self._seat(rank) + _BELL

    def counts(self, rank: int, parity: int) -> int:
        entry_bytes = _up_to(self.num_ranks * _COUNT_BYTES, _LINE_BYTES)
        return self._seat(self.num_ranks) + (2 * rank + parity) * entry_bytes

    def slot(self, rank: int, parity: int) -> int:
        return self.data + (2 * rank + parity) * self.slot_bytes

    def _seat(self, rank: int) -> int:
        return _SEATS + rank * _SEAT_BYTES


def _up_to(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple
