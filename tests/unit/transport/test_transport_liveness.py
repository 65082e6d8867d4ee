from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from phalanx.errors import PeerDiedError
from phalanx.transport.futex import Doorbell
from phalanx.transport.liveness import Party, Watch, ending_of, holds_memory, is_running, start_time_of, state_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch(Doorbell(memoryview(bytearray(4))))
    yield made
    made.close()


def _wait_for_bell(watch: Watch) -> None:
    assert watch._bell.wait(0, timeout_s=10)


def test_a_party_knows_itself() -> None:
    me = Party.me("brain")
    assert me.is_alive()
    assert str(me) == f"brain (pid {os.getpid()})"


def test_the_same_pid_with_another_start_time_is_another_process() -> None:
    me = Party.me("brain")
    assert not Party("brain", me.pid, me.start_time + 1).is_alive()


def test_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    party = Party.of("rank 3", child.pid)
    assert party.is_alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not party.is_alive()
    with pytest.raises(PeerDiedError, match="rank 3"):
        Party.of("rank 3", child.pid)


@pytest.mark.parametrize(
    ("state", "flags", "expected"),
    [("S", 0x400040, "S"), ("T", 0x400040, "T"), ("R", 0x400044, None), ("D", 0x40004C, None), ("Z", 0x400040, None)],
)
def test_a_process_is_gone_from_the_beginning_of_its_exit(
    state: str, flags: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such as a rank whose GPU's memory is still to be given back.
    stat = f"71 (a) S b) {state} 1 71 71 0 -1 {flags} 90 0 0 0 5 2 0 0 20 0 9 0 4242 1048576 100{' 0' * 28}".encode()
    monkeypatch.setattr("builtins.open", lambda path, mode: io.BytesIO(stat))
    assert state_of(71, 4242) == expected
    assert is_running(71) == (state != "Z"), "who waits for its end waits for all of it"
    assert holds_memory(71, 4242) == (state != "Z")
    assert not holds_memory(71, 4243)


def test_a_death_rings_within_milliseconds(child: subprocess.Popen[bytes], watch: Watch) -> None:
    party = Party.of("rank 3", child.pid)
    watch.add(party)
    watch.add(party)
    assert watch.dead == []
    started = time.monotonic()
    os.kill(child.pid, signal.SIGKILL)
    _wait_for_bell(watch)
    assert watch.dead == [party]
    assert time.monotonic() - started < 0.5


def test_who_is_dead_already_is_reported(child: subprocess.Popen[bytes], watch: Watch) -> None:
    party = Party.of("rank 3", child.pid)
    child.kill()
    child.wait()
    watch.add(party)
    _wait_for_bell(watch)
    assert watch.dead == [party]


def test_a_pid_that_is_in_use_again_is_a_death(watch: Watch) -> None:
    me = Party.me("rank 3")
    watch.add(Party(me.name, me.pid, me.start_time - 1))
    _wait_for_bell(watch)


def test_a_process_that_is_no_child_is_watched(watch: Watch) -> None:
    script = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    pid = int(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    party = Party.of("stranger", pid)
    watch.add(party)
    os.kill(pid, signal.SIGKILL)
    _wait_for_bell(watch)
    assert watch.dead == [party]


def test_a_closed_watch_rings_no_more(child: subprocess.Popen[bytes]) -> None:
    watch = Watch(Doorbell(memoryview(bytearray(4))))
    watch.add(Party.of("rank 3", child.pid))
    watch.close()
    watch.close()
    child.kill()
    child.wait()
    assert not watch._bell.wait(0, timeout_s=0.05)
    assert watch.dead == []


LARGE = "import sys; held = bytearray(1 << 30); held[::4096] = bytes(len(held) // 4096); print(flush=True); input()"


def test_how_a_process_ends_is_told_while_its_memory_is_given_back() -> None:
    with subprocess.Popen([sys.executable, "-c", LARGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        start_time = start_time_of(process.pid)
        assert start_time is not None and ending_of(process.pid, start_time) is None, "it has not begun to end"
        process.kill()
        told: list[int | None] = []
        while holds_memory(process.pid, start_time):
            told.append(ending_of(process.pid, start_time))
        assert set(told) <= {None, -signal.SIGKILL} and -signal.SIGKILL in told
        assert ending_of(process.pid, start_time + 1) is None, "another process has its pid"


def test_who_is_given_up_counts_as_dead_though_it_lives(watch: Watch, child: subprocess.Popen[bytes]) -> None:
    party = Party.of("rank 3", child.pid)
    watch.add(party)
    watch.give_up()
    _wait_for_bell(watch)
    assert watch.dead == [party] and party.is_alive()
    watch.close()
    watch.give_up()
    assert watch.dead == [party]
