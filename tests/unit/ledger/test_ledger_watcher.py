"""What a watcher sees of ranks on its own node, and when that is beyond doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from ledger_ranks import Clock, WritingRank

from phalanx.ledger import watcher
from phalanx.ledger.journal import JOURNAL_BYTES
from phalanx.ledger.patience import LEAST_S
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watcher import LONGEST_TRUST_S, LOOK_S, WatchedRank, Watcher, WatchOrder
from phalanx.transport.shared_memory import SharedSegment

REDUCE = "all_reduce float32 [3, 72]"


class Watched:
    """Two ranks, and what the kernel says of their cores."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in range(2)]
        self.clock = Clock()
        self.ranks = [
            WritingRank(rank, ["tp@0"], segment.buf, now_ns=self.clock) for rank, segment in enumerate(segments)
        ]
        self.starved_s = 0.0
        ranks = tuple(
            WatchedRank(rank=rank, node="alpha", groups=("", "tp@0"), journal=segment.handle)
            for rank, segment in enumerate(segments)
        )
        self._watcher = stack.enter_context(Watcher(WatchOrder(ranks=ranks, groups={"tp@0": (0, 1)})))

    def step(self, number: int, who: Sequence[int] = (0, 1)) -> None:
        """Into its only collective."""
        for rank in who:
            self.ranks[rank].begin(number)
            self.ranks[rank].issue("tp@0", REDUCE)

    def end_step(self) -> None:
        for rank in self.ranks:
            rank.done("tp@0")
            rank.end()

    def verdict(self, after_s: float, starving: float = 0.0, *, has_ended: bool = False) -> Verdict | None:
        """Looking all the time. `starving`: the share of it in which the ranks had no core."""
        found = None
        for _ in range(round(after_s / LOOK_S)):
            self.clock.pass_s(LOOK_S)
            self.starved_s += starving * LOOK_S
            found = self._watcher.verdict(self.clock(), has_ended=has_ended)
        return found

    def count_reads(self) -> list[int]:
        """How often each rank is looked at, from now on."""
        counts = [0, 0]
        for rank, one in enumerate(self._watcher._ranks):

            def look(*args: Any, rank: int = rank, look: Callable[..., Any] = one.look) -> Any:
                counts[rank] += 1
                return look(*args)

            self._monkeypatch.setattr(one, "look", look)
        return counts


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    with ExitStack() as stack:
        ranks = Watched(stack, monkeypatch)
        monkeypatch.setattr(watcher, "_times_of", lambda entries: (0.0, ranks.starved_s))
        ranks.step(1)
        ranks.end_step()
        assert ranks.verdict(0.5) is None
        yield ranks


def test_who_is_awaited_and_had_no_core_has_that_much_longer(watched: Watched) -> None:
    watched.ranks[1].begin(2)
    watched.step(2, [0])
    assert watched.verdict(2.0, starving=1.0) is None
    found = watched.verdict(LEAST_S + 0.5)
    assert found is not None and (found.cause, found.culprits) == ("late", (1,))


def test_so_has_a_collective_that_all_have_come_to(watched: Watched) -> None:
    watched.step(2)
    assert watched.verdict(3.0, starving=1.0) is None
    found = watched.verdict(LEAST_S + 0.5)
    assert found is not None and (found.cause, found.culprits, found.group) == ("hung", (), "tp@0")


def test_ranks_that_all_go_on_are_read_now_and_then(watched: Watched) -> None:
    read = watched.count_reads()
    for number in range(2, 42):
        watched.step(number)
        watched.end_step()
        assert watched.verdict(LOOK_S) is None
    assert read[0] == read[1] <= round(40 * LOOK_S / LONGEST_TRUST_S) + 1


def test_all_are_read_at_once_when_one_does_not_go_on(watched: Watched) -> None:
    watched.step(2)
    watched.end_step()
    watched.verdict(LOOK_S)
    read = watched.count_reads()
    watched.step(3, [0])
    watched.verdict(LOOK_S)
    assert read == [1, 1]


def test_all_are_read_at_once_when_one_has_ended(watched: Watched) -> None:
    watched.step(2)
    watched.end_step()
    watched.verdict(LOOK_S)
    read = watched.count_reads()
    watched.step(3)
    watched.verdict(LOOK_S, has_ended=True)
    assert read == [1, 1]
