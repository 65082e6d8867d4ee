"""From a line that has failed to the next one, with lines that are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

import phalanx.membership.standby as standby_module
from phalanx.config import HealingConfig
from phalanx.errors import DeadlineError, PeerDiedError, StartError
from phalanx.membership.ending import Ending
from phalanx.membership.lines import Interruption, Line, Lines
from phalanx.membership.recovery import Recovery

WITHIN_S = 20.0


class FakeExecutor:
    watched = failure = None

    def submit(self, *_: object, **__: object) -> Any:
        return self

    def done(self) -> bool:
        return False

    def check_health(self, timeout_s: float) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class FakeLines:
    """Starts lines that are ready at once, but for those to stand ready if `hangs` is set."""

    go_on_beside = False

    def __init__(self) -> None:
        self.hangs = threading.Event()
        self.num_standby = threading.Semaphore(0)
        self.num_lines = 1
        self.num_awaited = 0
        self.endings: tuple[Ending, ...] = ()

    def start(
        self, _: object, *, interruption: Interruption | None = None, is_awaited: bool = False, **__: object
    ) -> tuple[Line, None]:
        self.num_awaited += is_awaited
        if interruption is not None:
            self.num_standby.release()
            while self.hangs.is_set():
                if interruption.is_set:
                    raise StartError("rank 0", "starting", "killed by SIGKILL")
                time.sleep(0.001)
        self.num_lines += 1
        return line(self.num_lines), None

    def end(self, line: Line) -> None:
        self.endings = (*self.endings, Ending(line.epoch, line.executor))

    def await_ends(self) -> None:
        for ending in self.endings:
            if not ending.wait(WITHIN_S):
                raise ending.late(WITHIN_S)
        self.endings = ()

    def close(self) -> None: ...


class FakeMemory:
    is_whole = holds_weights = True
    shares_weights = False

    def of_ranks(self) -> dict[int, Any]:
        return {}

    def take(self, _: object) -> None: ...

    def close(self) -> None: ...


class FakePresence:
    def show(self, *_: object, **__: object) -> None: ...


def line(epoch: int) -> Line:
    return Line(epoch, cast(Any, FakeExecutor()), {})


@pytest.fixture
def lines() -> FakeLines:
    return FakeLines()


@pytest.fixture
def recovery(lines: FakeLines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recovery]:
    monkeypatch.setattr(standby_module, "SETTLE_S", 0.0)
    made = Recovery(
        HealingConfig(standby=1), cast(Any, lines), cast(Any, None), cast(Any, FakeMemory()), cast(Any, FakePresence())
    )
    yield made
    made.close()


def heal(recovery: Recovery, failed: Line) -> Line:
    found, keeps_cache, endings = recovery.carry_out(failed, PeerDiedError("rank 1", 7))
    assert keeps_cache and not endings
    return found


def until(condition: Callable[[], bool]) -> None:
    expires_at = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < expires_at
        time.sleep(0.001)


def test_nobody_waits_for_a_standby_line_whose_start_hangs(lines: FakeLines, recovery: Recovery) -> None:
    assert lines.num_standby.acquire(timeout=WITHIN_S)
    until(lambda: recovery.stats(1).standby == "ready")
    lines.hangs.set()
    now = heal(recovery, line(1))
    assert recovery.stats(now.epoch).healed == {"standby": 1}
    assert lines.num_standby.acquire(timeout=WITHIN_S), "the next one hangs"
    began_at = time.monotonic()
    heal(recovery, now)
    assert time.monotonic() - began_at < WITHIN_S
    assert recovery.stats(2).last_fault == "rank 1 (pid 7) died"
    assert recovery.stats(2).healed == {"standby": 1, "new line": 1} and recovery.stats(2).failed == {}
    assert lines.num_awaited == 1, "by requests, and not what stands ready"


def test_one_that_is_about_to_be_ready_is_waited_for(lines: FakeLines, recovery: Recovery) -> None:
    assert lines.num_standby.acquire(timeout=WITHIN_S)
    until(lambda: recovery.stats(1).standby == "ready")
    lines.hangs.set()
    now = heal(recovery, line(1))
    assert lines.num_standby.acquire(timeout=WITHIN_S)
    assert recovery._standby is not None
    recovery._standby._took_s = WITHIN_S
    threading.Timer(0.05, lines.hangs.clear).start()
    assert heal(recovery, now).epoch == lines.num_lines == 3, "and no other one was started"


@pytest.mark.parametrize("go_on_beside", [False, True])
def test_who_stands_ready_goes_on_beside_who_ends_where_that_takes_long(
    go_on_beside: bool, lines: FakeLines, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines.go_on_beside = go_on_beside
    assert lines.num_standby.acquire(timeout=WITHIN_S)
    until(lambda: recovery.stats(1).standby == "ready")
    failed, may_end = line(1), threading.Event()
    monkeypatch.setattr(failed.executor, "kill", lambda: may_end.wait(WITHIN_S))
    if not go_on_beside:
        threading.Timer(0.05, may_end.set).start()
    _, _, endings = recovery.carry_out(failed, PeerDiedError("rank 1", 7))
    assert recovery.stats(2).healed == {"standby": 1}
    assert [ending.are_gone for ending in endings] == ([False] if go_on_beside else [])
    may_end.set()
    until(lambda: all(ending.are_gone for ending in endings))
    until(lambda: recovery.stats(2).standby == "ready")


def test_without_a_line_that_stands_ready_the_end_of_the_one_before_is_awaited(
    lines: FakeLines, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines.go_on_beside = True
    recovery.rest_standby()
    failed, has_ended = line(1), threading.Event()
    monkeypatch.setattr(failed.executor, "kill", lambda: (time.sleep(0.05), has_ended.set()))
    assert not recovery.carry_out(failed, PeerDiedError("rank 1", 7)).endings
    assert has_ended.is_set()


@pytest.fixture
def real_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    monkeypatch.setattr("phalanx.membership.ending.AGAIN_S", 0.01)
    monkeypatch.setattr("phalanx.membership.lines.END_DEADLINE_S", 0.2)
    with Lines(cast(Any, None), cast(Any, None)) as made:
        yield made


def test_what_cannot_be_ended_is_tried_again_and_awaited_for_so_long(
    real_lines: Lines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed, may_end = line(1), threading.Event()

    def kill() -> None:
        if not may_end.is_set():
            raise DeadlineError("the end after SIGKILL", "rank 1 (pid 7)", 10.0)

    monkeypatch.setattr(failed.executor, "kill", kill)
    real_lines.end(failed)
    with pytest.raises(DeadlineError, match="the line of epoch 1"):
        real_lines.await_ends()
    assert "ranks of epoch 1 have not ended" in caplog.text
    interruption = Interruption()
    interruption.begin()
    with pytest.raises(StartError, match="not needed"):
        real_lines.await_ends(interruption)
    may_end.set()
    until(lambda: not real_lines.endings)
    real_lines.await_ends()


def test_ranks_that_have_handed_over_are_ended_later_and_with_the_formation_at_once(
    recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.membership.recovery.HANDED_OVER_S", 3600.0)
    before, is_killed = line(7), threading.Event()
    monkeypatch.setattr(before.executor, "kill", is_killed.set)
    recovery._end_later(before)
    assert not is_killed.is_set()
    recovery.close()
    assert is_killed.is_set()
