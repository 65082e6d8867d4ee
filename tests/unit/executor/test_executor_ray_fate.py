"""Who ends with whom: actors with the process that they work for, a Ray of our own with its driver."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from phalanx.executor.ray.fate import on_end_of
from phalanx.transport.liveness import Party

SOON_S = 2.0


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(["sleep", "60"])) for _ in range(3)]
        for process in started:
            stack.callback(process.kill)
        yield started


def test_the_death_of_a_party_is_told_at_once(sleepers: list[subprocess.Popen[bytes]]) -> None:
    told: list[float] = []
    party = Party.of("sleeper", sleepers[0].pid)
    stop = on_end_of(party, lambda: told.append(time.monotonic()))
    assert told == []
    killed_at = time.monotonic()
    sleepers[0].kill()
    while not told:
        assert time.monotonic() < killed_at + SOON_S
    stop()
    sleepers[0].wait()
    on_end_of(party, lambda: told.append(0.0))()  # who is dead already is told of too
    assert told[-1] == 0.0


def test_an_actor_ends_with_its_party(sleepers: list[subprocess.Popen[bytes]]) -> None:
    code = (
        "import sys; from phalanx.executor.ray.fate import end_with; from phalanx.transport.liveness import Party\n"
        "end_with(Party.of('brain', int(sys.argv[1]))); print('ready', flush=True)\n"
        "while True: pass\n"
    )
    command = [sys.executable, "-c", code, str(sleepers[0].pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as actor:
        assert actor.stdout is not None
        assert actor.stdout.readline() == b"ready\n"
        sleepers[0].kill()
        assert actor.wait(SOON_S) == 1


def test_the_keeper_ends_what_it_keeps_when_the_driver_ends(
    sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    driver, *kept = sleepers
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    arguments = [driver.pid, sockets, *(process.pid for process in kept)]
    command = [sys.executable, "-m", "phalanx.executor.ray.keeper", *map(str, arguments)]
    with subprocess.Popen(command) as keeper:
        with pytest.raises(subprocess.TimeoutExpired):
            keeper.wait(1.0)
        assert all(process.poll() is None for process in kept)
        driver.kill()
        for process in kept:
            assert process.wait(SOON_S) == -9
        assert keeper.wait(SOON_S) == 0
    assert not sockets.exists()
