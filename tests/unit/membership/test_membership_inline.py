"""The rank in the engine's own process fails: another one takes its place there, and streams are those without it."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
from formation_rig import Rig, Streams

from phalanx.errors import DeadlineError, WorkerError
from phalanx.membership.formation import Healing
from phalanx.protocol.worker import Call, Step
from phalanx.testing.checkpoints import write_checkpoint

_steps_to_fail: list[int] = []
"""How many more steps go well."""


class Clumsy:
    """A worker extension: a step raises."""

    def __init__(self, worker: Any) -> None:
        accept = worker.accept

        def accept_or_raise(call: Call) -> None:
            if isinstance(call.body, Step) and _steps_to_fail:
                _steps_to_fail[0] -= 1
                if not _steps_to_fail[0]:
                    _steps_to_fail.clear()
                    raise RuntimeError("not this step")
            accept(call)

        worker.accept = accept_or_raise


def run_with_an_exception(rig: Rig) -> Streams:
    _steps_to_fail.append(9)
    return rig.run()


def num_segments() -> int:
    """Of ranks' memory, that this process has."""
    gc.collect()
    return sum("memory of rank" in os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if _is_there(entry))


def _is_there(entry: os.DirEntry[str]) -> bool:
    return os.path.lexists(entry.path)


def test_an_exception_is_healed_in_the_process(tmp_path: Path) -> None:
    extension = f"{__name__}:{Clumsy.__name__}"
    rig = Rig(write_checkpoint(tmp_path / "llama"), tmp_path, launcher="inline", worker_extension_cls=extension)
    num_at_first = num_segments()
    for _ in range(2):
        assert run_with_an_exception(rig) == rig.expected
    assert rig.stats().healed == {"new line": 2}, "on the memory of the one before"
    rig.formation._recovery._memory.drop()  # type: ignore[union-attr]
    assert run_with_an_exception(rig) == rig.expected
    assert rig.stats().healed == {"new line": 2, "checkpoint": 1} and not rig.stats().failed
    assert rig.errors == [WorkerError] * 3
    assert num_segments() == num_at_first, "nothing of those that failed is kept"
    rig.close()


def test_nothing_stands_ready_behind_it(tmp_path: Path) -> None:
    """As a warning says."""
    rig = Rig(write_checkpoint(tmp_path / "llama"), tmp_path, launcher="inline", standby=1)
    assert rig.stats().standby == "none"
    rig.close()


def test_a_healing_that_hangs_is_given_up() -> None:
    healing = Healing(0.05)
    began_at = time.monotonic()
    with pytest.raises(DeadlineError, match="for ranks that go on from who heals them"):
        while time.monotonic() < began_at + 5.0:
            assert not healing.wait(0.01)
