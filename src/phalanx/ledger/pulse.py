"""Whether a rank's interpreter runs: somebody outside asks, a thread of the rank answers.

The answer needs the GIL, so it comes as soon as the rank runs any Python, and also while it is in a call into C that
has let go of the GIL: computing, waiting for a peer or for the GPU. It does not come while a call keeps the GIL. Nobody
asks a rank that writes records, for it has shown that it runs; the thread costs nothing as long as nobody asks.

No answer alone says little: perhaps there was no core for the rank. So the time counts in which the thread that should
answer slept, which means here that it waited for the GIL, less the time in which any thread of the rank waited for a
core: who holds the GIL must be able to let go of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from phalanx.ledger.journal_layout import ANSWERED_AT, ANSWERER_AT, ASKED_AT, JOURNAL_BYTES
from phalanx.ledger.journal_reader import Entries, Reader
from phalanx.transport.futex import Doorbell

ASK_EVERY_S = 0.2
ASK_IDLE_EVERY_S = 0.5
SOON_S = 0.1
"""Before this much time without an answer nothing is looked up."""

LONGEST_GAP_S = 0.4
"""Who looks less often may have had no core itself, and asks anew."""

END_DEADLINE_S = 1.0
_NS = 1e9
_MODULUS = 1 << 32


class Pulse:
    """The thread that answers, from its making to `close`."""

    def __init__(self, memory: memoryview, at_each: Callable[[], None] = lambda: None) -> None:
        """`memory`: of the rank's journal. `at_each` is called at each answer, in the thread, and must not block."""
        self._bell = Doorbell(memory[ASKED_AT : ASKED_AT + 4])
        self._words = memory[:JOURNAL_BYTES].cast("Q")
        self._at_each = at_each
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="phalanx-pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. From then on there is nobody to ask. May be called more than once."""
        self._closing = True
        self._bell.ring()
        self._thread.join(END_DEADLINE_S)

    def _run(self) -> None:
        words = self._words
        words[ANSWERER_AT // 8] = threading.get_native_id()
        while not self._closing:
            asked = self._bell.value()
            self._at_each()
            words[ANSWERED_AT // 8] = asked
            self._bell.wait(asked, None)
        words[ANSWERER_AT // 8] = 0


class _Question(msgspec.Struct):
    number: int
    asked_ns: int
    times: dict[int, ThreadTimes] | None = None
    """Of each thread of the rank, as soon as the answer is not prompt."""
    is_runnable: bool = False
    """Whether the thread that answers was seen to wait for a core, or to run, at the last look."""


class ThreadTimes(NamedTuple):
    """Since a thread's start, as the kernel counts; zeros where it does not."""

    ran_ns: int
    waited_ns: int
    """For a core."""


class Asker:
    """Asks one rank, and says for how long its GIL has been held. For the use of one thread, which looks often."""

    def __init__(self, memory: memoryview) -> None:
        """`memory`: of the rank's journal."""
        self._bell = Doorbell(memory[ASKED_AT : ASKED_AT + 4])
        self._words = memory[:JOURNAL_BYTES].cast("Q")
        self._reader = Reader(memory)
        self._question: _Question | None = None
        self._moved = (0, 0)
        self._looked_ns = self._ask_at_ns = 0

    def held_s(self, entries: Entries, now_ns: int) -> float:
        """For how long the interpreter has not run, though the process could have. Asks if it is time to."""
        was_away = now_ns - self._looked_ns > LONGEST_GAP_S * _NS
        self._looked_ns = now_ns
        moved, self._moved = self._moved, self._reader.moved
        if not entries.answerer or was_away or moved != self._moved:
            self._question = None
            return 0.0
        if self._question is not None and self._is_answered(self._question):
            self._question = None
            every_s = ASK_IDLE_EVERY_S if entries.phase in ("idle", "asleep") else ASK_EVERY_S
            self._ask_at_ns = now_ns + int(every_s * _NS)
        if self._question is None:
            if now_ns >= self._ask_at_ns:
                self._ask(now_ns)
            return 0.0
        if now_ns - self._question.asked_ns < SOON_S * _NS:
            return 0.0
        return self._held_s(self._question, entries, now_ns)

    def _held_s(self, question: _Question, entries: Entries, now_ns: int) -> float:
        state = thread_state(entries.pid, entries.answerer)
        if state != "S" and (state != "R" or question.is_runnable):  # it has no core, or was stopped: that is no answer
            self._ask(now_ns)
            return 0.0
        question.is_runnable = state == "R"  # once may be by chance: who waits for the GIL wakes every 5 ms
        if question.times is None:
            question.times = threads_times(entries.pid)
        took_ns = now_ns - question.asked_ns
        return max(took_ns - starved_ns(entries, question.times, took_ns), 0) / _NS

    def _ask(self, now_ns: int) -> None:
        self._bell.ring()
        self._question = _Question(self._bell.value(), now_ns)

    def _is_answered(self, question: _Question) -> bool:
        return (self._words[ANSWERED_AT // 8] - question.number) % _MODULUS < _MODULUS // 2


def thread_state(pid: int, thread: int) -> str:
    """The kernel's letter for what a thread does: "S" sleeps, "R" runs or would like to; "" if there is none."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return ""
    return chr(stat[stat.rindex(b")") + 2])


def thread_times(pid: int, thread: int) -> ThreadTimes:
    """How long a thread has run, and waited for a core."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
            ran, waited = file.read().split()[:2]
    except (OSError, ValueError):  # it has ended; or the kernel does not count
        return ThreadTimes(0, 0)
    return ThreadTimes(int(ran), int(waited))


def threads_times(pid: int) -> dict[int, ThreadTimes]:
    """Of all threads of a process."""
    try:
        return {int(thread): thread_times(pid, int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}
    except OSError:
        return {}


def starved_ns(entries: Entries, before: dict[int, ThreadTimes], took_ns: int) -> int:
    """How long a thread of the rank may have waited for a core of the last `took_ns`, at most.

    What the kernel counts as waiting is what is over. One that could run now may have waited whenever it did not run.
    """
    longest = 0
    for thread, times in before.items():
        if thread == entries.answerer:
            continue
        now = thread_times(entries.pid, thread)
        longest = max(longest, now.waited_ns - times.waited_ns)
        if now.ran_ns and thread_state(entries.pid, thread) == "R":
            longest = max(longest, took_ns - (now.ran_ns - times.ran_ns))
    return longest
