"""Whether a rank's interpreter runs, asked from outside."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from phalanx.ledger import pulse
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import ANSWERED_AT, ASKED_AT, JOURNAL_BYTES
from phalanx.ledger.journal_reader import Reader
from phalanx.ledger.look import HELD_S
from phalanx.ledger.pulse import Asker, Pulse, ThreadTimes
from phalanx.transport.shared_memory import SharedSegment

NS = 1_000_000_000
LOOK_S = 0.02


def hold() -> None:
    ctypes.PyDLL(None).usleep(60_000_000)


def let_go() -> None:
    ctypes.CDLL(None).usleep(60_000_000)


def loop() -> None:
    while True:
        pass


@contextmanager
def rank(does: Callable[[], None]) -> Iterator[memoryview]:
    """A process that does something for a minute, with a journal and a thread that answers."""
    with SharedSegment.create(JOURNAL_BYTES, "journal") as segment:
        pid = os.fork()
        if pid == 0:
            Journal(segment.buf, epoch=1).enter("stepping")
            Pulse(segment.buf)
            time.sleep(0.05)
            does()
        try:
            yield segment.buf
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def num_answers(journal: memoryview) -> int:
    """How many questions whether its interpreter runs the rank has answered."""
    return int(journal.cast("Q")[ANSWERED_AT // 8])


def asked(journal: memoryview, until: Callable[[float, int], bool]) -> float:
    """For how long the GIL was held, as soon as `until` holds of that and of the number of answers."""
    asker, reader = Asker(journal), Reader(journal)
    expires_at = time.monotonic() + 60
    while time.monotonic() < expires_at:
        held_s = asker.held_s(reader.read(0), time.monotonic_ns())
        if until(held_s, num_answers(journal)):
            return held_s
        time.sleep(LOOK_S)
    raise AssertionError("nothing for a minute")


def test_a_call_that_keeps_the_gil() -> None:
    with rank(hold) as journal:
        assert asked(journal, lambda held_s, _: held_s >= HELD_S) < 60


@pytest.mark.parametrize("does", [let_go, loop])
def test_a_rank_that_lets_go_of_it_answers(does: Callable[[], None]) -> None:
    with rank(does) as journal:
        asked(journal, lambda held_s, num_answers: num_answers >= 4)


class Clockwork:
    """A rank whose threads are what the test says, in place of /proc."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = memoryview(bytearray(JOURNAL_BYTES))
        self.journal = Journal(self.memory, epoch=1)
        self.journal.enter("stepping")
        self.memory.cast("Q")[pulse.ANSWERER_AT // 8] = 77
        self.states = {77: "S", 1: "S"}
        self.times = {77: ThreadTimes(0, 0), 1: ThreadTimes(1, 0)}
        monkeypatch.setattr(pulse, "thread_state", lambda pid, thread: self.states[thread])
        monkeypatch.setattr(pulse, "thread_times", lambda pid, thread: self.times[thread])
        monkeypatch.setattr(pulse, "threads_times", lambda pid: dict(self.times))
        self._asker = Asker(self.memory)
        self._now_ns = 10 * NS

    def held_s(self, after_s: float, each_look: Callable[[], None] = lambda: None) -> float:
        """After looking all the time."""
        held_s = 0.0
        for _ in range(round(after_s / 0.05)):
            each_look()
            self._now_ns += NS // 20
            held_s = self._asker.held_s(Reader(self.memory).read(0), self._now_ns)
        return held_s

    def pause(self, seconds: float) -> None:
        self._now_ns += int(seconds * NS)


def test_no_answer_while_it_could_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Clockwork(monkeypatch).held_s(1.1) == pytest.approx(1.0)


def test_who_has_no_core_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    starved = Clockwork(monkeypatch)
    starved.states[77] = "R"  # the thread that answers would like to run
    assert starved.held_s(3.0) < 0.1
    holder = Clockwork(monkeypatch)
    holder.states[1] = "R"  # the one that has the GIL would, and does not
    assert holder.held_s(3.0) == 0
    waited = Clockwork(monkeypatch)  # the same in spells, which the kernel has counted

    def wait() -> None:
        waited.times[1] = ThreadTimes(1, waited.times[1].waited_ns + NS // 20)

    assert waited.held_s(3.0, wait) < HELD_S


def test_a_holder_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Clockwork(monkeypatch)
    rank.states[1] = "R"

    def compute() -> None:
        rank.times[1] = ThreadTimes(rank.times[1].ran_ns + NS // 20, 0)

    assert rank.held_s(1.5, compute) > HELD_S


def test_who_notes_something_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Clockwork(monkeypatch)
    assert rank.held_s(3.0, lambda: rank.journal.enter("stepping")) == 0
    assert rank.memory.cast("I")[ASKED_AT // 4] == 0


def test_after_a_pause_it_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Clockwork(monkeypatch)
    rank.held_s(0.5)
    rank.pause(5.0)
    assert rank.held_s(0.5) < 0.5
