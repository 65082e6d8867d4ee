"""Which processes are ranks beside one another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from phalanx.testing.holdings import children_of
from phalanx.testing.reach import Place, ThisHost

SERVER = "{ sleep 60 & sleep 60 & wait; }"
"""A fork server with a rank of each of two lines."""

DEADLINE_S = 10.0


@contextlib.contextmanager
def processes(actor: str) -> Iterator[list[list[int]]]:
    """One process that has two others of this name, each with a server; gives the ranks of each."""
    own = f"exec -a {actor} bash -c 'bash -c \"{SERVER}\" & wait'"
    with subprocess.Popen(["bash", "-c", f"({own}) & ({own}) & wait"], start_new_session=True) as raylet:
        try:
            yield _await_ranks(raylet.pid)
        finally:
            os.killpg(raylet.pid, signal.SIGKILL)


def _await_ranks(raylet: int) -> list[list[int]]:
    expires_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < expires_at:
        servers = [server for actor in children_of(raylet) for server in children_of(actor)]
        ranks = [children_of(server) for server in servers]
        if [len(of_one) for of_one in ranks] == [2, 2]:
            return ranks
        time.sleep(0.01)
    raise TimeoutError(f"what process {raylet} has started is not there")


def beside(pid: int) -> set[int]:
    return {place.pid for place in ThisHost().ranks_beside(Place("here", pid))()}


def test_those_of_one_fork_server() -> None:
    with processes("engine") as (ranks, others):
        assert beside(ranks[0]) == {*ranks}
        assert beside(others[1]) == {*others}


def test_those_of_all_actors_of_ray() -> None:
    with processes("ray::RankActor.introduce") as (ranks, others):
        assert beside(ranks[0]) == beside(others[1]) == {*ranks, *others}


def test_a_process_that_is_gone() -> None:
    with pytest.raises(ProcessLookupError):
        beside(2**22 + 1)
