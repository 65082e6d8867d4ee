"""Ranks that come in place of others are judged anew, and those that have ended are forgotten."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from phalanx.ledger import program_watcher
from phalanx.ledger.confirmation import LOOK_S
from phalanx.ledger.program_watcher import Counts, ProgramWatcher
from phalanx.ledger.registry import VARIABLE, Registry
from phalanx.ledger.verdict import Verdict

WITHIN_S = 60.0
RANK = """
import os, sys
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.program import ALL_MEET
from phalanx.ledger.registry import LaneNotice, RankNotice, RegistryEntry
from phalanx.transport.shared_memory import SharedSegment

rank, world, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
segment = SharedSegment.create(JOURNAL_BYTES, "journal")
journal = Journal(segment.buf, epoch=1)
journal.begin_step(1, 1, 0)
journal.enter("stepping")
entry = RegistryEntry(os.environ)
entry.announce(RankNotice(world=world, rank=rank, node="here", journal=segment.handle))
entry.announce(LaneNotice(pid=os.getpid(), index=1, name="world", ranks=tuple(range(size))))
print(flush=True)
sys.stdin.readline()
journal.explain(2 | ALL_MEET, lambda: "all_reduce of 8 float32")
journal.issue(1, 1, 2 | ALL_MEET, 0)
print(flush=True)
sys.stdin.readline()
"""


class Program:
    """Ranks that do what the test says, and who watches them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        registry = stack.enter_context(Registry())
        self._environment = {VARIABLE: registry.place, "PYTHONPATH": ":".join(filter(None, sys.path))}
        self.watcher = stack.enter_context(ProgramWatcher(registry, patience_s=600.0))

    def start(self, ranks: list[int], size: int, world: str = "a world") -> dict[int, subprocess.Popen[str]]:
        """In this order; returns when all have made themselves known."""
        return {rank: self._start(rank, size, world) for rank in ranks}

    def meet(self, ranks: dict[int, subprocess.Popen[str]], *who: int) -> None:
        """These come to the collective."""
        for rank in who:
            stdin, stdout = ranks[rank].stdin, ranks[rank].stdout
            assert stdin is not None and stdout is not None
            stdin.write("\n")
            stdin.flush()
            stdout.readline()

    def kill(self, ranks: dict[int, subprocess.Popen[str]], *who: int) -> None:
        for rank in who:
            ranks[rank].kill()
            ranks[rank].wait()

    def look(self) -> list[Verdict]:
        time.sleep(LOOK_S)
        return self.watcher.look(time.monotonic_ns())

    def await_verdict(self) -> Verdict:
        expires_at = time.monotonic() + WITHIN_S
        while time.monotonic() < expires_at:
            if told := self.look():
                return told[0]
        raise AssertionError("no verdict")

    def _start(self, rank: int, size: int, world: str) -> subprocess.Popen[str]:
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), world, str(size)],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self._stack.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()
        return process


@pytest.fixture
def program() -> Iterator[Program]:
    with ExitStack() as stack:
        yield Program(stack)


def test_who_comes_when_all_others_have_ended_is_of_the_next_world(program: Program) -> None:
    """As when torchrun has more nodes than before: the rank that comes first has no predecessor."""
    program.look()
    first = program.start([0, 1], size=2)
    program.look()
    program.kill(first, 0, 1)
    assert program.look() == []
    second = program.start([2, 0, 1], size=3)
    assert program.look() == []
    program.meet(second, 1, 2)
    program.kill(second, 0)
    verdict = program.await_verdict()
    assert (verdict.cause, verdict.culprits, verdict.waiting) == ("gone", (0,), (1, 2))


def test_who_comes_when_another_has_ended_early_is_of_the_same_world(program: Program) -> None:
    first = program.start([0, 1], size=2)
    program.look()
    program.kill(first, 0)
    program.look()
    program.meet(first, 1)
    verdict = program.await_verdict()
    assert (verdict.cause, verdict.culprits, verdict.waiting) == ("gone", (0,), (1,))


def test_a_world_that_has_ended_is_forgotten(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_watcher, "ENDED_S", 0.0)
    for restart in range(2):
        ranks = program.start([0, 1], size=2, world=f"restart {restart}")
        program.look()
        assert len(program.watcher._worlds) == 1
        program.kill(ranks, 0, 1)
        expires_at = time.monotonic() + WITHIN_S
        while program.watcher._worlds:
            assert program.look() == [] and time.monotonic() < expires_at
    assert program.watcher.counts() == Counts(begun=4, ended=4)
