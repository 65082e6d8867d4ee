"""A verdict is told when it has stood, and once."""

from __future__ import annotations

from phalanx.ledger.confirmation import LOOK_S, Confirmation
from phalanx.ledger.verdict import HOPELESS, Cause, Verdict
from phalanx.ledger.watcher import LASTING

LOOK_NS = 30_000_000


def verdict(cause: Cause, culprit: int = 1) -> Verdict:
    return Verdict(cause=cause, culprits=(culprit,), nodes=("here",), what="does", group="tp@0", sequence=7)


def told(
    confirmation: Confirmation, found: list[Verdict | None], start: int = 10**12, look_ns: int = LOOK_NS
) -> list[int]:
    """The looks at which something is told."""
    return [i for i, one in enumerate(found) if confirmation.take(one, start + i * look_ns) is not None]


def test_what_lasts_is_told_at_once_and_once() -> None:
    assert told(Confirmation(), [None, verdict("gone"), verdict("gone")]) == [1]


def test_what_may_change_must_stand() -> None:
    late = verdict("late")
    assert told(Confirmation(), [late] * 4 + [None] + [late] * 20) == [9]
    assert told(Confirmation(), [verdict("late", i % 2) for i in range(20)]) == []


def test_what_ranks_do_not_get_out_of_is_seen_twice() -> None:
    for cause in HOPELESS - LASTING:
        assert told(Confirmation(), [verdict(cause)] * 20, look_ns=round(LOOK_S * 1e9)) == [1]


def test_it_is_looked_at_again_soon_if_only_that_is_missing() -> None:
    confirmation, start = Confirmation(), 10**12
    assert confirmation.next_look_s == LOOK_S
    assert confirmation.take(verdict("circle"), start) is None
    soon_s = confirmation.next_look_s
    assert soon_s < LOOK_S
    assert confirmation.take(verdict("circle"), start + int(soon_s * 1e9)) is not None
    assert confirmation.next_look_s == LOOK_S
    assert confirmation.take(verdict("late"), start + LOOK_NS) is None
    assert confirmation.next_look_s == LOOK_S, "that must stand for longer anyway"


def test_after_a_pause_it_must_stand_anew() -> None:
    confirmation, late = Confirmation(), verdict("slow")
    assert told(confirmation, [late] * 4) == []
    assert told(confirmation, [late] * 20, start=2 * 10**12) == [4]


def test_what_is_over_may_come_again() -> None:
    confirmation, stopped = Confirmation(), verdict("stopped")
    assert told(confirmation, [stopped] * 30) == [17]
    assert confirmation.told == stopped
    assert told(confirmation, [None] * 10, start=10**12 + 30 * LOOK_NS) == []
    assert confirmation.told is None
    assert told(confirmation, [stopped] * 30, start=10**12 + 40 * LOOK_NS) == [17]


def test_a_moment_without_it_does_not_end_it() -> None:
    confirmation, late = Confirmation(), verdict("late")
    assert told(confirmation, ([late] * 10 + [None]) * 5) == [4]
    assert confirmation.told == late


def test_what_another_watcher_has_told_is_not_told_again() -> None:
    stopped = verdict("stopped")
    confirmation = Confirmation(stopped)
    assert told(confirmation, [stopped] * 30) == []
    assert confirmation.told is stopped
    assert told(confirmation, [None] * 10, start=10**12 + 30 * LOOK_NS) == []
    assert confirmation.told is None, "but that it is over is"
