"""What is noted of a group's collectives is what its ranks have issued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.ledger.journal import JOURNAL_BYTES, GroupJournal, Journal, read

SIZE = 2


def partner() -> SingleGroup:
    """A group of one that says that it is of two."""
    spec = GroupSpec("tp@0", "single", (0,), epoch=1, timeout_s=1.0, join_timeout_s=1.0)
    group = SingleGroup(spec)
    group.size = SIZE
    return group


@pytest.mark.parametrize(
    "wrong",
    [
        lambda group: group.all_gather(torch.zeros(4, 4), dim=2),
        lambda group: group.reduce_scatter(torch.zeros(3, 4)),
        lambda group: group.all_to_all(torch.zeros(3, 4), [1, 1], [1, 1]),
        lambda group: group.broadcast(torch.zeros(4), src=SIZE),
    ],
)
def test_a_call_that_is_refused_is_not_noted(wrong: Callable[[Any], object]) -> None:
    """Its caller may catch the error, and go on; the peers have not been there."""
    memory = memoryview(bytearray(JOURNAL_BYTES))
    group = JournaledGroup(partner(), GroupJournal(Journal(memory, epoch=1), 1))
    with pytest.raises(AssertionError):
        wrong(group)
    group.barrier()
    entries = read(memory)
    assert entries.sequences[1] == 1 and [record.sequence for record in entries.records] == [1]
