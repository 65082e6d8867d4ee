"""What a watcher sees of ranks on its own node, and when that is beyond doubt."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from ledger_ranks import Clock, WritingRank

from phalanx.ledger.confirmation import FULL_LOOK_S, LOOK_S
from phalanx.ledger.endings import Endings
from phalanx.ledger.journal import Journal, note_process, prepare_journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.journal_reader import DeviceMarks
from phalanx.ledger.judge import judge
from phalanx.ledger.look import HELD_S, Look
from phalanx.ledger.patience import LEAST_S
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watch_order import WatchedRank, WatchOrder, stop_word
from phalanx.ledger.watcher import LONGEST_REST_S, LONGEST_TRUST_S, SHORT_S, Watcher, watch
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SharedSegment

REDUCE = "all_reduce float32 [3, 72]"
GATHER = "all_gather float32 [3, 72] dim=1"

GROUPS = ("tp@0", "ep@0")

SEEN = "phalanx.ledger.watched"
"""What looks at a single rank: what it knows from the kernel is said here instead."""


class Watched:
    """Two ranks or more, all in the same groups, and what the kernel says of their cores."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, num_ranks: int = 2) -> None:
        self._monkeypatch = monkeypatch
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in range(num_ranks)]
        self.clock = Clock()
        self.ranks = [
            WritingRank(rank, GROUPS, segment.buf, now_ns=self.clock) for rank, segment in enumerate(segments)
        ]
        self.starving: deque[bool] = deque()
        """At each look so far."""
        ranks = tuple(
            WatchedRank(rank=rank, node="alpha", groups=("", *GROUPS), journal=segment.handle)
            for rank, segment in enumerate(segments)
        )
        groups = dict.fromkeys(GROUPS, tuple(range(num_ranks)))
        self._watcher = stack.enter_context(Watcher(WatchOrder(ranks=ranks, groups=groups)))

    def step(self, number: int, who: Sequence[int] | None = None) -> None:
        """Into its only collective."""
        for rank in range(len(self.ranks)) if who is None else who:
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
            self.starving.append(starving > 0)
            found = self._watcher.verdict(self.clock(), has_ended=has_ended)
        return found

    def go_on(self, number: int, *, has_ended: bool = False) -> Verdict | None:
        """A step between two looks, up to the second one."""
        self.clock.pass_s(LOOK_S)
        self.step(number)
        self.end_step()
        return self._watcher.verdict(self.clock(), has_ended=has_ended)

    def starved_ns(self, took_ns: int) -> int:
        """Of the last `took_ns`."""
        num_looks = round(took_ns / 1e9 / LOOK_S)
        return round(sum(islice(reversed(self.starving), num_looks)) * LOOK_S * 1e9)

    def count_reads(self) -> list[int]:
        """How often each rank is looked at, from now on."""
        counts = [0] * len(self.ranks)
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
        monkeypatch.setattr(f"{SEEN}._cpu_s", lambda entries: 0.0)
        monkeypatch.setattr(f"{SEEN}.starved_ns", lambda entries, before, took_ns: ranks.starved_ns(took_ns))
        ranks.step(1)
        ranks.end_step()
        assert ranks.verdict(0.5) is None
        yield ranks


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Ranks that reduce in one group and gather in the other in each step."""
    with ExitStack() as stack:
        ranks = Watched(stack, monkeypatch, 3)
        monkeypatch.setattr(f"{SEEN}._cpu_s", lambda entries: 0.0)
        monkeypatch.setattr(f"{SEEN}.starved_ns", lambda entries, before, took_ns: ranks.starved_ns(took_ns))
        for number in range(1, 4):
            for one in ranks.ranks:
                one.begin(number)
                one.collective("tp@0", REDUCE)
                one.collective("ep@0", GATHER)
                one.end()
        assert ranks.verdict(0.5) is None
        yield ranks


def skip_the_last(ranks: Sequence[WritingRank]) -> None:
    """In step 4, of which the others leave nothing out: they are in it."""
    for one in ranks:
        one.begin(4)
        one.collective("tp@0", REDUCE)
    for one in ranks[:-1]:
        one.issue("ep@0", GATHER)
    ranks[-1].end()


def test_who_has_left_a_step_without_a_collective_is_named_when_all_have_come_to_a_standstill(three: Watched) -> None:
    skip_the_last(three.ranks)
    found = three.verdict(2 * LOOK_S)
    assert found is not None and (found.cause, found.culprits, found.group) == ("skipped", (2,), "ep@0")


def test_but_not_while_a_rank_is_on_its_way(three: Watched) -> None:
    """It may show that most leave the step without it."""
    for one in three.ranks:
        one.begin(4)
        one.collective("tp@0", REDUCE)
    three.ranks[0].collective("ep@0", GATHER)
    three.ranks[0].issue("ep@0", GATHER)
    three.ranks[2].collective("ep@0", GATHER)
    three.ranks[2].end()
    assert three.verdict(LEAST_S / 2) is None
    three.ranks[1].collective("ep@0", GATHER)
    three.ranks[1].end()
    found = three.verdict(2 * LOOK_S)
    assert found is not None and (found.cause, found.culprits) == ("diverged", (0,))


def test_ranks_that_wait_for_each_other_are_named_when_all_have_come_to_a_standstill(three: Watched) -> None:
    for one in three.ranks:
        one.begin(4)
    for one in three.ranks[:2]:
        one.issue("tp@0", REDUCE)
    assert three.verdict(LEAST_S / 2) is None
    three.ranks[2].issue("ep@0", GATHER)
    found = three.verdict(2 * LOOK_S)
    assert found is not None and (found.cause, found.culprits) == ("circle", (2,))


class FakeOtherNodes:
    """They have no ranks, and what they tell is so old."""

    def __init__(self) -> None:
        self.tell_all = False
        self.age_ns = 0
        self.take = lambda *_: None
        self.looks = self.steps = self.unheard = self.unwatched = lambda *_: {}

    def have_told_all(self) -> bool:
        return self.tell_all

    def seen_ns(self, now_ns: int) -> int:
        return now_ns - self.age_ns


def test_over_nodes_it_takes_two_looks_at_all_records_that_are_of_different_moments(
    three: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = FakeOtherNodes()
    monkeypatch.setattr(three._watcher, "_others", others)
    skip_the_last(three.ranks)
    assert three.verdict(2 * LEAST_S) is None, "the newest records are no proof"
    others.tell_all = True
    assert three.verdict(FULL_LOOK_S) is None
    others.age_ns = round(FULL_LOOK_S * 1e9)
    assert three.verdict(FULL_LOOK_S) is None, "nothing new has come"
    others.age_ns = 0
    found = three.verdict(FULL_LOOK_S)
    assert found is not None and (found.cause, found.culprits) == ("skipped", (2,))


def test_over_nodes_patience_and_the_second_look_are_over_at_the_same_time(
    three: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = FakeOtherNodes()
    others.tell_all = True
    monkeypatch.setattr(three._watcher, "_others", others)
    skip_the_last(three.ranks)
    found = three.verdict(LEAST_S + FULL_LOOK_S + LOOK_S)
    assert found is not None and (found.cause, found.culprits) == ("skipped", (2,))


def test_what_was_found_stands_until_all_nodes_have_told_what_is_needed_to_judge_anew(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.ranks[1].begin(2)
    watched.step(2, [0])
    found = watched.verdict(LEAST_S + 0.5)
    assert found is not None and found.cause == "late"
    own, look = watched._watcher, watched._watcher.look
    monkeypatch.setattr(own, "look", lambda *arguments: without(own, look, *arguments))
    monkeypatch.setattr(own, "_others", SimpleNamespace(have_told_all=lambda: False, steps=dict))
    assert watched.verdict(1.0) == found


def without(own: Watcher, look: Callable[..., Look], *arguments: int) -> Look:
    """As if there was no other node."""
    others, own._others = own._others, None
    try:
        return look(*arguments)
    finally:
        own._others = others


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
    assert found.is_of_a_busy_host and not watched.verdict(60.0).is_of_a_busy_host  # type: ignore[union-attr]


def test_a_rank_without_a_core_that_has_yet_to_begin_a_step_is_starved_as_well(watched: Watched) -> None:
    """It is idle, as far as it says so itself."""
    watched.step(2, [0])
    assert watched.verdict(3.0, starving=1.0) is None
    found = watched.verdict(LEAST_S + 0.5)
    assert found is not None and (found.cause, found.culprits) == ("behind", (1,)) and found.is_of_a_busy_host


def test_who_sleeps_is_not_starved(watched: Watched) -> None:
    watched.step(2, [0])
    found = watched.verdict(LEAST_S + 0.5)
    assert found is not None and found.cause == "behind" and not found.is_of_a_busy_host


@pytest.mark.parametrize("starving", [0.0, 1.0])
def test_how_long_steps_take_is_no_excuse_for_who_does_not_begin_one(watched: Watched, starving: float) -> None:
    for rank in watched.ranks:
        rank.begin(2)
    watched.clock.pass_s(2.0)
    watched.end_step()
    assert watched.verdict(0.5) is None
    watched.ranks[0].begin(3, num_tokens=512)
    watched.ranks[0].issue("tp@0", REDUCE)
    found = watched.verdict(LEAST_S + 0.5, starving)
    assert (found is None) if starving else (found is not None and (found.cause, found.culprits) == ("behind", (1,)))


def test_who_is_in_a_step_has_the_time_that_steps_take(watched: Watched) -> None:
    for rank in watched.ranks:
        rank.begin(2)
    watched.clock.pass_s(2.0)
    watched.end_step()
    assert watched.verdict(0.5) is None
    watched.step(3, [0])
    watched.ranks[1].begin(3)
    assert watched.verdict(10.0) is None


def test_who_may_hold_its_gil_is_not_late_yet(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    held_s = HELD_S / 2
    monkeypatch.setattr(watched._watcher._ranks[1]._asker, "held_s", lambda *_: held_s)
    watched.step(2, [0])
    watched.ranks[1].begin(2)
    assert watched.verdict(LEAST_S + 0.5) is None
    held_s = 0.0  # it has answered
    found = watched.verdict(FULL_LOOK_S)
    assert found is not None and (found.cause, found.culprits) == ("late", (1,))


def test_a_step_that_nobody_needs_a_rank_in(watched: Watched) -> None:
    watched.ranks[0].begin(2)
    watched.ranks[0].end()
    assert watched.verdict(LEAST_S - 0.2) is None
    found = watched.verdict(0.5)
    assert found is not None and (found.cause, found.culprits, found.step) == ("behind", (1,), 2)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_has_not_begun_its_journal(number: signal.Signals) -> None:
    """Killed, it is its parent that says so: it may as well have told what is wrong."""
    with ExitStack() as stack:
        segment = stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal"))
        prepare_journal(segment.buf)
        process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(process.kill)
        order = WatchedRank(rank=3, node="alpha", groups=("",), journal=segment.handle)
        seen = stack.enter_context(Watcher(WatchOrder(ranks=(order,), groups={})))
        assert seen.look(0).ranks == {}
        note_process(segment.buf, process.pid, Party.of("rank 3", process.pid).start_time)
        process.send_signal(number)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        look = seen.look(0)
        verdict = judge(look)
    if number == signal.SIGKILL:
        assert verdict is None and look.ranks[3].process == "ended"
    else:
        assert verdict is not None and (verdict.cause, verdict.culprits) == ("stopped", (3,))
        assert verdict.what == "is stopped by a signal, while starting"


def test_ranks_that_all_go_on_are_read_now_and_then(watched: Watched) -> None:
    read = watched.count_reads()
    for number in range(2, 42):
        assert watched.go_on(number) is None
    assert read[0] == read[1] <= round(40 * LOOK_S / LONGEST_TRUST_S) + 1


def test_ranks_that_go_the_same_way_are_compared_and_not_read(watched: Watched) -> None:
    read = watched.count_reads()
    for number in range(2, 42):
        assert watched.go_on(number) is None
    assert read == [0, 0]


def test_ranks_that_do_one_thing_for_long_are_read_however_they_go_on(watched: Watched) -> None:
    """It may be too long for that."""
    for one in watched.ranks:
        one.begin(2)
    read = watched.count_reads()
    for _ in range(round(2 * SHORT_S / LOOK_S)):
        watched.clock.pass_s(LOOK_S)
        for one in watched.ranks:
            one.collective("tp@0", REDUCE)
        watched._watcher.verdict(watched.clock())
    assert read[0] == read[1] >= round(SHORT_S / LONGEST_TRUST_S) - 1


@pytest.mark.parametrize("what", ["another collective", "another plan", "fewer collectives"])
def test_ranks_that_go_on_on_different_ways_are_told(watched: Watched, what: str) -> None:
    found = None
    for number in range(2, 3 + round(LONGEST_TRUST_S / LOOK_S)):
        watched.clock.pass_s(LOOK_S)
        for rank, one in enumerate(watched.ranks):
            one.begin(number, "their plan" if what == "another plan" and rank else "plan")
            if what != "fewer collectives" or not rank:
                one.collective("tp@0", GATHER if what == "another collective" and rank else REDUCE)
            one.end()
        found = found or watched._watcher.verdict(watched.clock())
    assert found is not None and (found.cause, found.step) == ("diverged", 2)


def test_nothing_is_done_as_long_as_all_go_on(watched: Watched) -> None:
    watched.go_on(2)
    assert watched._watcher.all_go_on(watched.clock())
    watched.clock.pass_s(LOOK_S)
    assert not watched._watcher.all_go_on(watched.clock())  # nobody has noted anything since
    watched.step(3, [0])
    assert not watched._watcher.all_go_on(watched.clock())
    watched.step(3, [1])
    assert watched._watcher.all_go_on(watched.clock())
    watched.clock.pass_s(LONGEST_TRUST_S)
    watched.end_step()
    assert not watched._watcher.all_go_on(watched.clock())


def test_endings_wait_again_while_all_go_on() -> None:
    read, write = os.pipe()
    goes_on = iter((True, True, False))
    with Endings() as endings:
        assert not endings.wait(read, [], 0.001, lambda now_ns: next(goes_on))
        assert next(goes_on, None) is None
        os.close(write)
        assert endings.wait(read, [], 0.001, lambda now_ns: True)
    os.close(read)


def test_endings_are_told_at_once_while_all_go_on() -> None:
    read, write = os.pipe()
    with Endings() as endings, subprocess.Popen(["true"]) as process:
        while not endings.has_one:
            assert not endings.wait(read, [process.pid], 0.001, lambda now_ns: True)
    os.close(read)
    os.close(write)


def test_ranks_that_rest_are_read_now_and_then(watched: Watched) -> None:
    read = watched.count_reads()
    assert watched.verdict(2.0) is None
    assert 0 < read[0] == read[1] <= 2.0 / LONGEST_REST_S + 1


def test_all_are_read_at_once_when_one_begins_after_a_rest_and_does_not_go_on(watched: Watched) -> None:
    """Where it was idle when it was read is not where it rests."""
    assert watched.verdict(1.0) is None
    read = watched.count_reads()
    watched.step(2, [0])
    watched.verdict(LOOK_S)
    assert read == [1, 1]


def test_all_are_read_at_once_when_one_does_not_go_on(watched: Watched) -> None:
    watched.go_on(2)
    read = watched.count_reads()
    watched.step(3)
    watched.verdict(LOOK_S)
    assert read == [1, 1]


def test_all_are_read_at_once_when_one_has_ended(watched: Watched) -> None:
    watched.go_on(2)
    read = watched.count_reads()
    watched.go_on(3)
    assert read == [0, 0]
    watched.go_on(4, has_ended=True)
    assert read == [1, 1]


def test_a_process_with_a_gpu_is_long_about_its_end(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is woken by its beginning."""
    watched.go_on(2)
    read = watched.count_reads()
    one = watched._watcher._ranks[1]
    assert one._entries is not None
    monkeypatch.setattr(one, "_entries", msgspec.structs.replace(one._entries, device=DeviceMarks(0, 0, 0)))
    monkeypatch.setattr(f"{SEEN}.process_of", lambda entries: "running" if entries.device is None else "gone")
    watched.go_on(3)
    assert read == [1, 1]


@pytest.mark.parametrize(
    ("ended", "by_themselves", "told"),
    [((1,), (1,), [1]), ((1,), (), []), ((0, 1), (1,), [1]), ((), (1,), [])],
    ids=["seen with the order to stop", "ended by who stops it", "so is another one by now", "not yet"],
)
def test_who_has_ended_before_it_is_to_stop_is_told_of(
    ended: tuple[int, ...], by_themselves: tuple[int, ...], told: list[int]
) -> None:
    """Both may be seen at once: who heals hears of an end from somebody else, and lets go of the other ranks."""
    with ExitStack() as stack:
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in range(2)]
        processes = [stack.enter_context(subprocess.Popen(["sleep", "60"])) for _ in segments]
        for segment, process in zip(segments, processes, strict=True):
            stack.callback(process.kill)
            journal = Journal(segment.buf, epoch=1)
            journal.enter("stepping")
            journal.begin_step(1, 7, 1)
            note_process(segment.buf, process.pid, Party.of("a rank", process.pid).start_time)
        ranks = tuple(
            WatchedRank(rank=rank, node="here", groups=("",), journal=segment.handle)
            for rank, segment in enumerate(segments)
        )
        (stop, stopping), (verdicts, telling) = os.pipe(), os.pipe()
        for end in (stop, verdicts):
            stack.callback(os.close, end)
        for rank in ended:
            processes[rank].kill()
            os.waitid(os.P_PID, processes[rank].pid, os.WEXITED | os.WNOWAIT)
        os.write(stopping, stop_word(by_themselves))
        os.close(stopping)
        watch(WatchOrder(ranks=ranks, groups={}), stop, telling)
        os.close(telling)
        found = [msgspec.json.decode(line, type=Verdict) for line in os.read(verdicts, 1 << 16).splitlines()]
        assert [one.culprits for one in found] == [(rank,) for rank in told]
        assert all(one.cause == "gone" for one in found)
