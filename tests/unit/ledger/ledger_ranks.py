"""Ranks that write journals and do nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal, Mark
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.journal_reader import read
from phalanx.ledger.look import Look, RankLook
from phalanx.ledger.record import PlanSize


class Named(NamedTuple):
    """A collective that is no more than its name."""

    digest: int
    name: str = "a collective"

    def __str__(self) -> str:
        return self.name


class WritingRank:
    """A rank with a journal in plain memory, unless it is given some."""

    def __init__(
        self,
        rank: int,
        groups: Sequence[str],
        memory: memoryview | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
        marks: tuple[Mark, Mark] | None = None,
    ) -> None:
        self.rank = rank
        self.memory = memoryview(bytearray(JOURNAL_BYTES)) if memory is None else memory
        self.journal = Journal(self.memory, epoch=1, now_ns=now_ns)
        self.process: Literal["running", "stopped", "gone", "ended"] = "running"
        self._groups = ("", *groups)
        if marks is not None:
            self.journal.follow_device(*marks)
        self._notes = {name: group_notes(i, self.journal, None) for i, name in enumerate(groups, start=1)}
        self._step = 0

    def begin(self, step: int, plan: str = "plan", num_tokens: int = 1, size: PlanSize | None = None) -> None:
        self.journal.enter("stepping")
        self._step = self.journal.begin_step(step, hash_of(plan), num_tokens, size)

    def end(self) -> None:
        self.journal.done(self._step)
        self.journal.enter("idle")

    def issue(self, group: str, what: str) -> None:
        collective = Named(hash_of(what), what)
        self._notes[group].explain(collective)
        self._notes[group].issue(collective)

    def done(self, group: str) -> None:
        self._notes[group].done()

    def fail(self, group: str) -> None:
        self._notes[group].failed()

    def collective(self, group: str, what: str) -> None:
        self.issue(group, what)
        self.done(group)

    def sequence(self, group: str) -> int:
        """Of its newest collective there."""
        return self._notes[group].sequence

    def look(self, **seen: float) -> RankLook:
        """`seen`: what /proc says of it."""
        how = "was killed by SIGKILL" if self.process == "gone" else ""
        return RankLook(
            rank=self.rank,
            node="here",
            groups=self._groups,
            process=self.process,
            how=how,
            entries=read(self.memory),
            **seen,
        )


def hash_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class Clock:
    """Stands still, but for what a test moves it by: nobody waits for longer because the test had no core."""

    def __init__(self) -> None:
        self.ns = time.monotonic_ns()

    def __call__(self) -> int:
        return self.ns

    def pass_s(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)


def look_at(
    ranks: Sequence[WritingRank], groups: dict[str, Sequence[int]], now_ns: Callable[[], int] = time.monotonic_ns
) -> Look:
    return Look(now_ns(), {rank.rank: rank.look() for rank in ranks}, groups)
