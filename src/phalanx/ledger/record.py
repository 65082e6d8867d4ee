"""What a rank notes, in 64 bytes: the layout of a record. No torch here."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

RECORD_BYTES = 64
LAYOUT = struct.Struct("<QIHBxQQQQQQ")
DONE_AT = 56
"""Where the last field begins, which is written by itself when what was begun is done."""

ISSUED_AT = 48
"""Where the time stands at which it began."""

KIND_AT = 14
"""Where the kind of what is noted stands, a byte."""

EPOCH_SHIFT, GROUP_SHIFT, KIND_SHIFT = 0, 32, 48
"""Where the three begin in the second word, of 64 bits."""

assert LAYOUT.size == RECORD_BYTES and DONE_AT + 8 == RECORD_BYTES


class Kind(enum.IntEnum):
    """What is noted."""

    COLLECTIVE = 1
    """A collective that was issued."""
    STEP = 2
    """A step that was begun, as its plan says it: a decision."""
    CAPTURED = 3
    """A collective that was put into a graph. Each replay of that is a COLLECTIVE."""


class Record(NamedTuple):
    """One note of one rank. Times are nanoseconds of the host's monotonic clock."""

    number: int
    """From 1 on, over the whole life of the rank."""
    epoch: int
    group: int
    """Index of the group among the rank's; 0 for a step."""
    kind: int
    step: int
    """0 outside of steps."""
    sequence: int
    """Of a collective: its place among the group's, from 1; of a captured one, among those of its graph. Of a step: the
    tokens of all replicas."""
    digest: int
    """Differs where what is done differs: operation, dtype and shape, or the plan."""
    rolling: int
    """The digest of all that came before in the group, this one included. Of a step: what the plan says of its size, as
    a word (PlanSize)."""
    issued_ns: int
    done_ns: int
    """0 as long as it is not done. Of a collective on a device: when the device was given it."""

    @property
    def is_done(self) -> bool:
        return self.done_ns > 0


_SIZE_BITS = 21
_MOST = (1 << _SIZE_BITS) - 1


class PlanSize(NamedTuple):
    """How large a step is for a rank: of its own replica."""

    num_tokens: int
    num_rows: int
    num_samples: int

    @property
    def word(self) -> int:
        """All of it in 63 bits. Nothing is as large as what fits."""
        tokens, rows, samples = (min(number, _MOST) for number in self)
        return tokens | rows << _SIZE_BITS | samples << 2 * _SIZE_BITS

    @classmethod
    def of_word(cls, word: int) -> PlanSize | None:
        """None if nothing was said."""
        tokens, rows, samples = (word >> i * _SIZE_BITS & _MOST for i in range(3))
        return cls(tokens, rows, samples) if word else None


PRIME = 0x100000001B3
WORD = 0xFFFFFFFFFFFFFFFF


def rolled(rolling: int, digest: int) -> int:
    """The rolling digest after one more (FNV's way of mixing, over 64-bit words instead of bytes)."""
    return ((rolling ^ digest) * PRIME) & WORD
