"""A process that the kernel kills for lack of memory, and no other one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.executor.out_of_memory import OutOfMemoryKills
from phalanx.testing import memory_limit
from phalanx.testing.faults import World

RUN_OUT = "from phalanx.testing import memory_limit; memory_limit.enter(); memory_limit.run_out()"


def groups_of(pid: int) -> list[Path]:
    """Others' come and go."""
    return [path for where, *_ in memory_limit._HIERARCHIES for path in where.glob(f"phalanx-limit-{pid}")]


@pytest.mark.skipif(not memory_limit.is_possible(), reason="needs control groups with a limit on memory")
def test_the_kernel_kills_who_runs_out_and_counts_it() -> None:
    before = OutOfMemoryKills.now()
    process = subprocess.Popen([sys.executable, "-c", RUN_OUT])
    assert process.wait(60.0) == -signal.SIGKILL
    assert "has killed" in before.explain(OutOfMemoryKills.now())
    memory_limit.remove_groups()
    assert not groups_of(process.pid)


@pytest.mark.skipif(not memory_limit.is_possible(), reason="needs control groups with a limit on memory")
def test_the_group_of_a_living_process_stays() -> None:
    waiting = f"{RUN_OUT.rpartition(';')[0]}; print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    memory_limit.remove_groups()
    assert groups_of(process.pid)
    process.communicate(b"\n", 60.0)
    memory_limit.remove_groups()
    assert not groups_of(process.pid)


def test_without_such_groups_nothing_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.setattr(memory_limit, "_HIERARCHIES", ((plain, "memory.max", "memory.swap.max", "0"),))
    assert not memory_limit.is_possible.__wrapped__() and not os.listdir(plain)
    with pytest.raises(PermissionError, match="no control groups"):
        memory_limit.enter()
    assert World(2).why_not("oom") is not None and World(2, has_memory_limits=True).why_not("oom") is None
