"""A link that is dialled until somebody answers, in a thread, while its user goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from phalanx.errors import PeerDiedError, StartError
from phalanx.ledger import redialling
from phalanx.ledger.redialling import LEAST_PAUSE_S, LONGEST_PAUSE_S, Redialling

SOON_S = 5.0
BROKEN = PeerDiedError("the judge", 1, "the connection is closed")


class Link:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Other:
    """Who is dialled: answers those attempts that it is told to."""

    def __init__(self) -> None:
        self.answers = True
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.links: list[Link] = []
        self.dialled_at: list[float] = []

    def reach(self) -> Link:
        self.dialled_at.append(time.monotonic())
        assert self.may_answer.wait(SOON_S)
        if not self.answers:
            raise StartError("the link", "connecting", "refused")
        self.links.append(Link())
        return self.links[-1]


def await_that(condition: Callable[[], object]) -> None:
    expires_at = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < expires_at
        time.sleep(0.002)


def test_one_link_until_it_breaks_and_then_another() -> None:
    other = Other()
    with Redialling(other.reach, "the judge") as judge:
        await_that(judge.link)
        first = judge.link()
        assert first is judge.link() is other.links[0]
        judge.lose(BROKEN)
        assert other.links[0].is_closed
        await_that(judge.link)
        assert judge.link() is other.links[1] and len(other.links) == 2
    assert other.links[1].is_closed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("a mistake of ours")])
def test_whatever_an_attempt_ends_with_there_is_another(error: Exception) -> None:
    attempts: list[int] = []

    def reach() -> Link:
        attempts.append(1)
        if len(attempts) == 1:
            raise error
        return Link()

    with Redialling(reach, "the judge") as judge:
        await_that(judge.link)
    assert len(attempts) == 2


def test_nobody_waits_for_an_attempt_and_what_comes_of_it_too_late_is_closed() -> None:
    other = Other()
    other.may_answer.clear()
    with Redialling(other.reach, "the judge") as judge:
        for _ in range(100):
            assert judge.link() is None
    assert len(other.dialled_at) == 1, "one attempt at a time"
    other.may_answer.set()
    await_that(lambda: other.links and other.links[0].is_closed)


def test_pauses_grow_and_it_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(redialling, "WARN_S", 0.2)
    other = Other()
    other.answers = False
    with caplog.at_level("INFO", "phalanx.ledger"), Redialling(other.reach, "the judge") as judge:
        await_that(lambda: judge.link() or len(other.dialled_at) == 4)
        await_that(lambda: not judge._is_dialling)
        pauses = [after - before for before, after in zip(other.dialled_at, other.dialled_at[1:], strict=False)]
        assert all(pause >= 0.5 * LEAST_PAUSE_S * 2**i for i, pause in enumerate(pauses)), pauses
        for _ in range(20):
            judge._put_off(0.0)
        assert judge._pause_s == LONGEST_PAUSE_S
        judge._dial_at = 0.0
        other.answers = True
        await_that(judge.link)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert said[0].startswith("the judge cannot be reached, and is dialled until it can: ") and "refused" in said[0]
    assert said[1].startswith("the judge is reached again, after ")


def test_after_a_link_that_has_lasted_pauses_are_short_again(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other()
    with Redialling(other.reach, "the judge") as judge:
        await_that(judge.link)
        judge.lose(BROKEN)
        judge.lose(BROKEN)
        assert judge._pause_s == 4 * LEAST_PAUSE_S, "a link that breaks at once is dialled more and more seldom"
        monkeypatch.setattr(redialling, "SOUND_S", 0.0)
        judge.lose(BROKEN)
        assert judge._pause_s == 2 * LEAST_PAUSE_S
