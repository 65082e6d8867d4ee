"""Whatever becomes of the watcher, the run goes on; and a verdict that ends it is the error, whoever was first."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from test_executor_executor import ScriptedChannel, ScriptedLauncher

from phalanx.errors import DeadlineError, HungError, PeerDiedError, PhalanxError, StartError, WorkerError
from phalanx.executor import watching
from phalanx.executor.cause import VERDICT_GRACE_S
from phalanx.executor.executor import Executor
from phalanx.executor.watching import MAX_RESTARTS, Watching, start_watching
from phalanx.ledger.other_nodes import OtherNodesOrder
from phalanx.ledger.reporting import Judge, ReportOrder
from phalanx.ledger.verdict import Cause, Verdict
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.membership.lines import ENDS_AFTER_S
from phalanx.protocol.worker import Failure, Ping
from phalanx.transport.address import listen_on
from phalanx.transport.keys import RunKey
from phalanx.transport.shared_memory import SegmentHandle

NOBODY = WatchOrder(ranks=(), groups={})
WITHIN_S = 30.0


def verdict(cause: Cause) -> Verdict:
    return Verdict(cause=cause, culprits=(1,), nodes=("here",), what="does what its peers do not")


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have a script be the watcher. None is left afterwards."""

    def instead(script: str) -> None:
        path = tmp_path / "watcher"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    yield instead
    assert await_threads_end(), "a watcher is left"


def await_threads_end() -> bool:
    ends_at = time.monotonic() + WITHIN_S
    while any(thread.name == "phalanx-watching" for thread in threading.enumerate()) and time.monotonic() < ends_at:
        time.sleep(0.01)
    return not any(thread.name == "phalanx-watching" for thread in threading.enumerate())


def says(*what: bytes) -> str:
    """A watcher that says this, and stays until it is to stop."""
    return (
        f"cat > /dev/null; printf '%s\\n' {' '.join(repr(one.decode()) for one in what)}; read stop < /proc/self/fd/$4"
    )


def saying(*what: Verdict | None) -> str:
    return says(*map(msgspec.json.encode, what))


def test_one_that_cannot_be_started_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert start_watching(NOBODY, lambda: None, lambda rank: None) is None
    assert "no ledger: the watcher did not start" in caplog.text


def test_one_that_ends_before_it_has_its_order(pretend: Any) -> None:
    pretend("exit 3")
    long = WatchOrder(ranks=(), groups={f"group {i}": tuple(range(64)) for i in range(20_000)})
    with pytest.raises(StartError, match="it ended at once, exit code 3"):
        Watching(long, lambda: None)


def test_ctrl_c_while_it_starts(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Watching(NOBODY, lambda: None)


def test_what_makes_no_sense(pretend: Any, caplog: pytest.LogCaptureFixture) -> None:
    pretend("cat > /dev/null; echo nonsense; sleep 60")
    watcher = Watching(NOBODY, lambda: None)
    watcher._thread.join(WITHIN_S)
    assert watcher._process is not None and watcher._process.returncode == -9
    assert "what the watcher says is lost" in caplog.text
    watcher.close()


def test_it_ends_though_somebody_else_has_the_pipe() -> None:
    watcher = Watching(NOBODY, lambda: None)
    inherited = os.dup(watcher._stop_write)
    try:
        watcher.close()
        assert watcher._process is not None and watcher._process.returncode == 0
    finally:
        os.close(inherited)


def test_what_stands_and_what_is_over(pretend: Any, caplog: pytest.LogCaptureFixture) -> None:
    pretend(saying(verdict("late"), None))
    with caplog.at_level(logging.INFO, "phalanx.ledger"):
        watcher = Watching(NOBODY, lambda: None)
        assert watcher.await_verdict(WITHIN_S) == verdict("late")
        ends_at = time.monotonic() + WITHIN_S
        while watcher.standing is not None and time.monotonic() < ends_at:
            time.sleep(0.01)
        watcher.close()
    assert watcher.standing is None and watcher.verdict == verdict("late")
    assert "over: rank 1 on here does what" in caplog.text


def await_that(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


@pytest.mark.parametrize("is_soon", [True, False])
def test_how_a_rank_ended_is_asked_of_its_parent(pretend: Any, caplog: pytest.LogCaptureFixture, is_soon: bool) -> None:
    """What is told does not wait for it: of a process with a GPU it is not known soon."""
    pretend(saying(verdict("gone")))
    has_ended = threading.Event()
    asked: list[int] = []

    def ending_of(rank: int) -> str | None:
        asked.append(rank)
        return "killed by SIGKILL" if is_soon or has_ended.is_set() else None

    watcher = Watching(NOBODY, lambda: None, ending_of)
    found = watcher.await_verdict(WITHIN_S)
    assert is_soon or found == verdict("gone")
    has_ended.set()
    await_that(lambda: watcher.verdict is not None and watcher.verdict.what == "is gone: killed by SIGKILL")
    assert watcher.standing == watcher.verdict and set(asked) == {1}
    watcher.close()
    assert ("how rank 1 on here ended: killed by SIGKILL" in caplog.text) is not is_soon


def test_one_that_ends_is_replaced(pretend: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next one is told what stands, and says when that is over."""
    first, order = tmp_path / "first", tmp_path / "order"
    told = msgspec.json.encode(verdict("late")).decode()
    pretend(f"cat > {order}; if mkdir {first}; then echo '{told}'; exit 3; fi; echo null; read stop < /proc/self/fd/$4")
    with caplog.at_level(logging.INFO, "phalanx.ledger"):
        watcher = Watching(NOBODY, lambda: None)
        await_that(lambda: "over: rank 1 on here does what" in caplog.text)
    assert watcher.verdict == verdict("late") and watcher.standing is None
    assert msgspec.msgpack.decode(order.read_bytes(), type=WatchOrder).standing == verdict("late")
    assert caplog.text.count("the watcher has ended, exit code 3: another one is started") == 1
    watcher.close()


def test_the_judge_of_other_nodes_is_told_how_many_there_were_before(pretend: Any, tmp_path: Path) -> None:
    first, order = tmp_path / "first", tmp_path / "order"
    pretend(f"cat > {order}.new; mv {order}.new {order}; mkdir {first} && exit 3; read stop < /proc/self/fd/$4")
    judge = Judge(address="127.0.0.1", port=1, key=RunKey.new())
    watcher = Watching(ReportOrder(node="beta", watch=NOBODY, judge=judge, own_address="127.0.0.1"), None)
    await_that(first.exists)
    await_that(lambda: msgspec.msgpack.decode(order.read_bytes(), type=ReportOrder).watch.num_restarts == 1)
    watcher.close()


def test_one_that_ends_again_and_again_is_replaced_later(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pretend(f"cat > /dev/null; test -e {tmp_path}/good || exit 3; read stop < /proc/self/fd/$4")
    monkeypatch.setattr(watching, "RESTARTS_WITHIN_S", 2.0)
    watcher = Watching(NOBODY, lambda: None)
    assert watcher.await_hopeless(WITHIN_S) is None and not watcher._has_watcher, "nobody is waited for meanwhile"
    assert caplog.text.count("another one is started") == MAX_RESTARTS
    told = f"exit code 3, as have {MAX_RESTARTS} in 2 s before it: the next one is started in"
    assert told in caplog.text
    (tmp_path / "good").touch()
    await_that(lambda: watcher._has_watcher)
    assert caplog.text.count("another one is started") == MAX_RESTARTS + 1
    watcher.close()


def test_one_that_waits_to_be_replaced_is_closed_at_once(pretend: Any, caplog: pytest.LogCaptureFixture) -> None:
    pretend("cat > /dev/null; exit 3")
    watcher = Watching(NOBODY, lambda: None)
    await_that(lambda: "the next one is started in" in caplog.text)
    began_at = time.monotonic()
    watcher.close()
    assert not watcher._thread.is_alive() and time.monotonic() - began_at < 2.0


def test_one_that_cannot_be_started_again_is_later(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """For want of descriptors, say."""
    pretend(f"cat > /dev/null; mkdir {tmp_path}/first && exit 3; read stop < /proc/self/fd/$4")
    spawn, failures = watching.spawn_watcher, [OSError(errno.EMFILE, "Too many open files")]

    def spawn_later(*given: Any) -> Any:
        if (tmp_path / "first").exists() and failures:
            raise failures.pop()
        return spawn(*given)

    monkeypatch.setattr(watching, "spawn_watcher", spawn_later)
    watcher = Watching(NOBODY, lambda: None)
    told = "the watcher could not be started: [Errno 24] Too many open files: another one is started"
    await_that(lambda: told in caplog.text)
    await_that(lambda: watcher._process is not None and watcher._process.poll() is None)
    watcher.close()


def test_those_that_hang_are_replaced_and_one_that_beats_is_not(
    pretend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one after some beats, the second one before any; the third one is long about its first."""
    beats = "for i in 1 2 3 4 5 6 7 8 9; do printf 0000000$i 1<> /proc/self/fd/$5; sleep 0.1; done"
    first = f"if mkdir {tmp_path}/first; then {beats}; exec sleep 60; fi"
    second = f"if mkdir {tmp_path}/second; then exec sleep 60; fi"
    pretend(f"cat > /dev/null; {first}; {second}; sleep 1; while :; do {beats}; done")
    monkeypatch.setattr(watching, "CHECK_S", 0.05)  # so one is silent after 0.75 s, and after 1.5 s at first
    watcher = Watching(NOBODY, lambda: None)
    try:
        await_that(lambda: caplog.text.count("the watcher hung: another one is started") == 2)
        time.sleep(3.0)
        assert caplog.text.count(") has not looked for 1 s, and is killed") == 2
        assert watcher._process is not None and watcher._process.poll() is None
    finally:
        assert watcher._process is not None
        watcher._process.kill()
        watcher.close()


def test_one_that_is_stopped_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watching, "CHECK_S", 0.2)  # so one is silent after 3 s, and after 6 s at first
    with caplog.at_level(logging.INFO, "phalanx.ledger"):
        watcher = Watching(NOBODY, lambda: None)
        first = watcher._process
        assert first is not None
        os.kill(first.pid, signal.SIGSTOP)
        await_that(lambda: watcher._process is not first)
        assert f"the watcher (pid {first.pid}) has not looked for 3 s, and is killed" in caplog.text
        assert "the watcher hung: another one is started" in caplog.text
        await_that(lambda: int.from_bytes(watcher._beats._memory[:], "little") > 3)
        watcher.close()


@pytest.mark.parametrize("call", ["pipe", "memfd_create"])
def test_one_that_lacks_a_descriptor_is_done_without_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    num_open = len(os.listdir("/proc/self/fd"))
    with listen_on("127.0.0.1") as listener:
        others = OtherNodesOrder(
            listener=listener.fileno(), key=RunKey.new(), ranks={}, node_timeout_s=5.0, steps_ahead=2
        )
        monkeypatch.setattr(os, call, none_left)
        assert start_watching(msgspec.structs.replace(NOBODY, other_nodes=others), lambda: None) is None
    assert "no ledger: the watcher did not start: [Errno 24] Too many open files" in caplog.text
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_none_takes_the_place_of_one_that_has_said_its_last_word(
    pretend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = msgspec.json.encode(verdict("skipped")).decode()
    pretend(f"cat > /dev/null; echo '{told}'")
    watcher = Watching(NOBODY, lambda: None)
    watcher._thread.join(WITHIN_S)
    assert watcher.await_hopeless(0.0) == verdict("skipped") and "another one" not in caplog.text
    watcher.close()


def test_the_next_one_listens_where_the_first_one_did(pretend: Any, tmp_path: Path) -> None:
    """Though who has made the socket has closed it by then."""
    pretend(f"cat > {tmp_path}/order; exit 3")
    with listen_on("127.0.0.1") as listener:
        place = os.fstat(listener.fileno())
        others = OtherNodesOrder(
            listener=listener.fileno(), key=RunKey.new(), ranks={}, node_timeout_s=5.0, steps_ahead=2
        )
        watcher = Watching(msgspec.structs.replace(NOBODY, other_nodes=others), lambda: None)
    await_that(lambda: not watcher._has_watcher)
    order = msgspec.msgpack.decode((tmp_path / "order").read_bytes(), type=WatchOrder)
    assert order.other_nodes is not None and order.other_nodes.listener != others.listener
    watcher.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(order.other_nodes.listener)
    assert len(watcher._restarted_at) == MAX_RESTARTS, f"it was there for each of them: {place}"


def failure(watcher: Watching, what: Failure | PhalanxError) -> PhalanxError:
    """What a run ends with in which rank 0 says this, or the channel."""
    channel = ScriptedChannel()
    executor = Executor(ScriptedLauncher(), channel, 1, 30.0, output_ranks=[0], resources=ExitStack(), watching=watcher)
    channel.script.append((0, what) if isinstance(what, Failure) else cast(Any, what))
    with executor, pytest.raises(PhalanxError) as caught:
        executor.submit(Ping(), deadline_s=30.0).result()
    return caught.value


def mismatch() -> Failure:
    return Failure("here", "", "CollectiveMismatchError", "differs", "", False)


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_of_a_mismatch_and_a_verdict_the_verdict_is_the_error(pretend: Any, pause_s: float) -> None:
    pretend(f"sleep {pause_s}; {saying(verdict('diverged'))}")
    error = failure(Watching(NOBODY, lambda: None), mismatch())
    assert isinstance(error, HungError) and str(error).startswith("rank 1 on here does")
    assert isinstance(error.__cause__, WorkerError) and "differs" in str(error.__cause__)


@pytest.mark.parametrize("waits", [True, False])
def test_in_strict_who_is_to_blame_is_told_before_ranks_end(pretend: Any, waits: bool) -> None:
    """Whatever was told before. Of a watcher that has ended nothing is awaited."""
    last = f"sleep 0.3; {saying(verdict('diverged'))}"
    pretend(f"cat > /dev/null; echo '{msgspec.json.encode(verdict('late')).decode()}'; {last if waits else 'exit 3'}")
    watcher = Watching(NOBODY, lambda: None, ends_after_s={})
    watcher.await_verdict(WITHIN_S)
    if not waits:
        await_that(lambda: not watcher._has_watcher)
    began_at = time.monotonic()
    error = failure(watcher, mismatch())
    assert isinstance(error, WorkerError) and error.kind == "CollectiveMismatchError"
    assert watcher.verdict == verdict("diverged" if waits else "late")
    assert waits or time.monotonic() - began_at < VERDICT_GRACE_S / 2


def test_a_mismatch_that_no_verdict_explains_is_told_as_it_is(pretend: Any) -> None:
    pretend(saying(verdict("late")))
    error = failure(Watching(NOBODY, lambda: None), mismatch())
    assert isinstance(error, WorkerError) and error.kind == "CollectiveMismatchError"


def test_a_deadline_names_what_stands(pretend: Any) -> None:
    pretend(saying(verdict("stopped")))
    watcher = Watching(NOBODY, lambda: None)
    watcher.await_verdict(WITHIN_S)
    error = failure(watcher, DeadlineError("step 7", "rank 0", 60.0))
    assert isinstance(error, DeadlineError) and error.waited_s == 60.0
    assert str(error).startswith("waited 60 s for step 7 from rank 0; the ledger's verdict: rank 1 on here does")


def test_so_does_that_of_ranks_in_a_collective_which_may_come_first(pretend: Any) -> None:
    pretend(saying(verdict("stopped")))
    watcher = Watching(NOBODY, lambda: None)
    watcher.await_verdict(WITHIN_S)
    late = Failure("here", "", "DeadlineError", "waited 6 s for all_reduce from rank 1", "", False)
    error = failure(watcher, late)
    assert isinstance(error, WorkerError) and error.rank == 0
    assert str(error).startswith("rank 0 on here: DeadlineError: waited 6 s for all_reduce from rank 1; the ledger's")
    assert "verdict: rank 1 on here does" in str(error)


def test_a_death_is_a_death(pretend: Any) -> None:
    pretend(saying(verdict("gone")))
    watcher = Watching(NOBODY, lambda: None)
    assert isinstance(failure(watcher, PeerDiedError("node alpha", 7)), PeerDiedError)


def test_ranks_are_ended_for_what_has_stood_for_as_long_as_asked(pretend: Any) -> None:
    pretend(saying(verdict("stopped")))
    ended = threading.Event()
    watcher = Watching(NOBODY, ended.set, ends_after_s={"stopped": 0.01})
    assert ended.wait(WITHIN_S) and watcher.await_hopeless(WITHIN_S) == verdict("stopped")
    error = failure(watcher, PeerDiedError("rank 1", 7))
    assert isinstance(error, HungError) and str(error).startswith("rank 1 on here does")


def test_who_is_gone_first_is_named_though_its_peers_were_ended_for_it_and_are_gone_before(pretend: Any) -> None:
    """A process with a GPU is long about its end; so nobody waits either to hear how it was."""
    pretend(saying(verdict("gone")))
    ended, asked = threading.Event(), threading.Event()

    def ending_of(_: int) -> str | None:
        assert ended.is_set(), "before its peers were ended"
        asked.set()
        return "killed by SIGKILL"

    watcher = Watching(NOBODY, ended.set, ending_of, ends_after_s={"gone": 0.0})
    assert ended.wait(WITHIN_S) and asked.wait(WITHIN_S)
    channel, launcher = ScriptedChannel(), ScriptedLauncher()
    launcher.exited[1] = "killed by SIGKILL"
    executor = Executor(launcher, channel, 3, 30.0, output_ranks=[0], resources=ExitStack(), watching=watcher)
    channel.script.extend(cast(Any, [PeerDiedError("rank 2", 12), PeerDiedError("rank 1", 11)]))
    with executor, pytest.raises(PeerDiedError) as caught:
        executor.submit(Ping(), deadline_s=30.0).result()
    error = caught.value
    assert (error.party, error.pid, error.detail) == ("rank 1", 11, "killed by SIGKILL")


def test_ranks_live_that_come_back_in_time(pretend: Any) -> None:
    pretend(saying(verdict("stopped"), None, verdict("late")))
    ended = threading.Event()
    watcher = Watching(NOBODY, ended.set, ends_after_s={"stopped": 60.0, "skipped": 0.0})
    while watcher.standing != verdict("late"):
        time.sleep(0.01)
    assert watcher._patience is None and watcher.await_hopeless(0.0) is None
    watcher.close()
    assert not ended.is_set()


@pytest.mark.parametrize("cause", ["late", "behind", "hung"])
def test_ranks_that_may_lack_a_core_are_left_to_their_deadline(pretend: Any, cause: Cause) -> None:
    """Until it turns out that they do not come although they have one."""
    starved, asleep = (
        msgspec.structs.replace(verdict(cause), waited_s=3.0, starved_s=starved_s) for starved_s in (0.4, 0.2)
    )
    assert starved.is_of_a_busy_host and not asleep.is_of_a_busy_host
    ended = threading.Event()
    pretend(saying(starved))
    watcher = Watching(NOBODY, ended.set, ends_after_s=dict.fromkeys(ENDS_AFTER_S, 0.01))
    assert watcher.await_verdict(WITHIN_S) == starved and watcher._patience is None
    watcher.close()
    assert not ended.is_set()
    pretend(saying(starved, asleep))
    watcher = Watching(NOBODY, ended.set, ends_after_s=dict.fromkeys(ENDS_AFTER_S, 0.01))
    assert ended.wait(WITHIN_S) and watcher.await_hopeless(WITHIN_S) == asleep
    watcher.close()


def test_a_watcher_that_is_told_to_be_silent_tells_nothing_of_what_is_done_next(
    pretend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = msgspec.json.encode(verdict("gone")).decode()
    pretend(f"cat > /dev/null; read stop < /proc/self/fd/$4; echo '{told}'")
    watcher = Watching(NOBODY, lambda: None)
    watcher.silence()
    watcher.close()
    assert watcher.verdict is None and "verdict" not in caplog.text


def test_what_had_happened_before_is_in_the_log(pretend: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A rank's end is seen by who heals, maybe before the watcher has told of it."""
    told = msgspec.json.encode(verdict("gone")).decode()
    pretend(f"cat > /dev/null; read stop < /proc/self/fd/$4; echo '{told}'")
    ranks = tuple(WatchedRank(rank=rank, node="here", groups=(), journal=SegmentHandle(0, 0, 0, 0)) for rank in (0, 1))
    watcher = Watching(WatchOrder(ranks=ranks, groups={}), lambda: None, {1: "killed by SIGKILL"}.get)
    watcher.silence()
    watcher.close()
    assert "verdict: rank 1 on here is gone: killed by SIGKILL" in caplog.text
    assert watcher.verdict is None and watcher.standing is None
