"""What is noted of a group's collectives is what its ranks have issued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.journal_reader import read

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
    group = JournaledGroup(partner(), group_notes(1, Journal(memory, epoch=1), None))
    with pytest.raises(AssertionError):
        wrong(group)
    group.barrier()
    entries = read(memory)
    assert entries.sequences[1] == 1 and [record.sequence for record in entries.records] == [1]


def test_an_error_is_not_hidden_by_what_is_told_to_the_device() -> None:
    """A CUDA error leaves a stream that takes no more writes: who catches the error must see that one."""
    memory = memoryview(bytearray(JOURNAL_BYTES))
    journal, inner, is_broken = Journal(memory, epoch=1), partner(), False

    def mark(number: int) -> None:
        if is_broken:
            raise RuntimeError("cuStreamWriteValue64 failed")

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        nonlocal is_broken
        is_broken = True
        raise RuntimeError("an illegal memory access")

    journal.follow_device(mark, mark)
    inner.all_reduce = all_reduce  # type: ignore[method-assign]
    group = JournaledGroup(inner, group_notes(1, journal, None))
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        group.all_reduce(torch.zeros(3))
    assert caught.value.__context__ is None
    assert [record.is_done for record in read(memory).records] == [False]
