"""What a program that is not ours has in its ranks' journals: what both who writes and who judges must know."""

from __future__ import annotations

import zlib

from phalanx.ledger.journal_layout import MAX_GROUPS

ALL_MEET = 1
"""The bit of a collective's digest that says whether nobody gets through before all members have come."""

ENDING = 1
"""What stands for how a rank ended, among the texts, if that was an error."""

JOINING = "joining"
"""The lane in which ranks find each other: what they go through there is `init_process_group`."""

JOINING_INDEX = MAX_GROUPS - 1
"""In the records of every rank's journal."""

WHOLE_PROGRAM = 1
"""The step that a program is in if it does not tell its steps."""

ENDED_STEP = 1 << 62
"""The step in which a rank is that has ended in order."""


def joining_text(size: int) -> str:
    """What ranks do in the lane JOINING."""
    return f"init_process_group of {size} ranks"


def joining_digest(size: int) -> int:
    """Of that. Some backends let a rank through before all have come."""
    return zlib.crc32(joining_text(size).encode()) << ALL_MEET


def step_of(number: int) -> int:
    """The step, in the journal, for the step `number` of the program."""
    if not 0 <= number < ENDED_STEP - WHOLE_PROGRAM - 1:
        raise ValueError(f"a step's number is from 0 on, not {number}")
    return number + WHOLE_PROGRAM + 1


def number_of(step: int) -> int | None:
    """The inverse of `step_of`; None for what is no step of the program."""
    return step - WHOLE_PROGRAM - 1 if WHOLE_PROGRAM < step < ENDED_STEP else None
