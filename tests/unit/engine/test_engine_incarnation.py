"""What is seen of an engine's ranks, also of those that it does not show."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phalanx.engine import incarnation as incarnation_module
from phalanx.engine.incarnation import Incarnation
from phalanx.ledger.board import Notice
from phalanx.transport.liveness import group_members

WITHIN_S = 20.0


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A process that shows nothing, and has started another one."""
    script = "sleep 100 & echo; wait"
    process = subprocess.Popen(["/bin/sh", "-c", script], process_group=0, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process
    finally:
        for pid in group_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait(WITHIN_S)
        process.stdout.close()


def incarnation_of(process: subprocess.Popen[bytes]) -> Incarnation:
    child = cast(Any, SimpleNamespace(pid=process.pid))
    return Incarnation(child, cast(Any, None), cast(Any, None), cast(Any, None), silence_timeout_s=60.0)


def test_who_is_left_of_an_engine_is_waited_for_whether_it_was_shown_or_not(engine: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        incarnation = incarnation_of(engine)
        engine.kill()
        engine.wait(WITHIN_S)
        (left,) = group_members(engine.pid)
        waiting = asyncio.create_task(incarnation.until_ranks_are_gone())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        os.kill(left, signal.SIGKILL)
        await asyncio.wait_for(waiting, WITHIN_S)
        assert group_members(engine.pid) == []

    asyncio.run(run())


def test_ranks_that_were_not_shown_at_first_are_looked_at_later(
    engine: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        incarnation = incarnation_of(engine)
        assert incarnation._attached is None
        found = SimpleNamespace(instance=SimpleNamespace(epoch=2))
        incarnation._follow(2)
        assert incarnation._attached is None, "there is nothing yet"
        monkeypatch.setattr(incarnation_module, "_attach", lambda pid: found)
        incarnation._follow(2)
        assert cast(Any, incarnation._attached) is found
        monkeypatch.setattr(found, "notice", lambda: Notice(counts={"gone": 1}, num_restarts=2), raising=False)
        closed: list[object] = []
        monkeypatch.setattr(found, "close", lambda: closed.append(found), raising=False)
        incarnation._follow(3)  # these are yet to be shown
        assert closed == [found] and cast(Any, incarnation._attached) is found
        assert incarnation._num_watcher_restarts_before == 0
        others = SimpleNamespace(
            instance=SimpleNamespace(epoch=4),
            notice=lambda: Notice(counts={"gone": 2}, num_restarts=1),
            standing=lambda awaits_since_ns: None,
        )
        monkeypatch.setattr(incarnation_module, "_attach", lambda pid: others)
        incarnation._follow(3)
        incarnation._follow(3)  # said before the ranks of epoch 4 have healed, which are shown already
        incarnation._follow(4)
        found_now = incarnation.condition
        assert (found_now.verdicts, found_now.num_watcher_restarts) == ({"gone": 3}, 3), "those of ranks before count"

    asyncio.run(run())
