"""Watches the ranks of programs that are not ours, as they make themselves known, and says what is wrong.

Ranks that were started together are a world and are judged together. One that comes in place of an earlier one, as
after a restart, begins the world anew.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, NamedTuple

import msgspec

from phalanx.errors import FrameError, PeerDiedError
from phalanx.ledger.confirmation import Confirmation
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.journal_reader import Reader
from phalanx.ledger.program_verdict import Newcomer, ProgramLook, ProgramRank, judge_program
from phalanx.ledger.registry import LaneNotice, NewcomerNotice, RankNotice, Registry
from phalanx.ledger.stacks import stack_of
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watched import GLANCE_RECORDS
from phalanx.transport.liveness import state_of
from phalanx.transport.shared_memory import SharedSegment

LOOKS_A_WHOLE = 16
"""One of so many looks is at all records: a program may have gone on since it gave away what it waits for."""

ENDED_S = 2.0
"""A world that has ended for so long is forgotten: it has been looked at as a whole meanwhile."""

_NS = 10**9

Process = Literal["running", "stopped", "gone"]

log = logging.getLogger("phalanx.ledger")


def _process_at(pid: int, start_time: int) -> Process:
    """What a process does."""
    state = state_of(pid, start_time)
    if state is None:
        return "gone"
    return "stopped" if state in "Tt" else "running"


class _Rank:
    """A rank whose journal is mapped."""

    def __init__(self, notice: RankNotice) -> None:
        """Raises PeerDiedError or FrameError if its process has ended already."""
        self.notice = notice
        self.segment = SharedSegment.attach(notice.journal)
        self._reader = Reader(self.segment.buf)
        entries = self._reader.read(0)
        self._pid, self._start_time = entries.pid, entries.start_time
        self.lanes: dict[int, str] = {}
        self._gone_since_ns = 0

    @property
    def started_ns(self) -> int:
        """When its process was, by the clock of journals."""
        since_boot_ns = self._start_time * _NS // os.sysconf("SC_CLK_TCK")
        return since_boot_ns - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns())

    @property
    def last_sign_ns(self) -> int:
        """When it has noted something last."""
        entries = self._reader.read(1)
        return max(entries.phase_since_ns, *(max(one.issued_ns, one.done_ns) for one in entries.records), 0)

    def look(self, now_ns: int, most_records: int) -> ProgramRank:
        process = self._process()  # before what it noted: that is all if it is gone
        entries = self._reader.read(most_records)
        if process == "gone" and not self._gone_since_ns:
            self._gone_since_ns = now_ns
        gone_s = (now_ns - self._gone_since_ns) / 1e9 if self._gone_since_ns else 0.0
        return ProgramRank(
            rank=self.notice.rank,
            node=self.notice.node,
            lanes=dict(self.lanes),
            process=process,
            gone_s=gone_s,
            entries=entries,
        )

    @property
    def has_ended(self) -> bool:
        return self._process() == "gone"

    def end(self) -> None:
        """Kill its process, if that lives."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._pid)
            try:
                if state_of(self._pid, self._start_time) is not None:  # the pid means this process, still
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _process(self) -> Process:
        return _process_at(self._pid, self._start_time)


def _newcomer(notice: NewcomerNotice) -> Newcomer:
    process = _process_at(notice.pid, notice.start_time)
    return Newcomer(rank=notice.rank, node=notice.node, process=process, pid=notice.pid)


class _World:
    """Ranks that were started together."""

    def __init__(self, newcomers: Mapping[int, NewcomerNotice]) -> None:
        """`newcomers`: processes that are to become ranks, by rank, as they say so."""
        self.newcomers = newcomers
        self.ranks: dict[int, _Rank] = {}
        self.lanes: dict[str, tuple[int, ...]] = {}
        self.has_ended = False
        """Whether all its ranks have, long ago."""
        self._confirmation = Confirmation()
        self._is_over = False

    def is_before(self, rank: _Rank) -> bool:
        """Whether a rank belongs to those that come in place of these: there is one in its place, or none is left."""
        others = self.ranks.values()
        return rank.notice.rank in self.ranks or all(
            one.has_ended and one.last_sign_ns < rank.started_ns for one in others
        )

    def look(self, now_ns: int, most_records: int) -> ProgramLook:
        ranks = {rank: one.look(now_ns, most_records) for rank, one in self.ranks.items()}
        newcomers = {rank: _newcomer(one) for rank, one in self.newcomers.items() if rank not in ranks}
        here = frozenset(rank for one in self.ranks.values() for rank in one.notice.here)
        return ProgramLook(now_ns, ranks, dict(self.lanes), newcomers, here)

    def verdict(self, now_ns: int, most_records: int, patience_s: float, *, is_last: bool) -> Verdict | None:
        """What is to be told now."""
        look = self.look(now_ns, most_records)
        self.has_ended = most_records == NUM_RECORDS and all(one.gone_s > ENDED_S for one in look.ranks.values())
        if self._is_over:
            return None
        found = judge_program(look, patience_s)
        told = self._confirmation.take(found, now_ns)
        if is_last and found is not None and found.is_final:
            told = found
        self._is_over = told is not None and told.is_final
        return told

    def with_stacks(self, verdict: Verdict, now_ns: int) -> Verdict:
        """The verdict, and where the ranks are that it is about. Blocks for a second at most."""
        look, found = self.look(now_ns, 0), {}
        for rank in (*verdict.culprits[:1], *[rank for rank in verdict.waiting if rank not in verdict.culprits][:1]):
            if place := self._stacks_of(look, rank):
                found[rank] = stack_of(*place)
        return msgspec.structs.replace(verdict, stacks={rank: lines for rank, lines in found.items() if lines})

    def _stacks_of(self, look: ProgramLook, rank: int) -> tuple[int, int] | None:
        """The process and the descriptor that a rank's stacks are read from; None if they cannot be."""
        if rank in look.ranks and look.ranks[rank].process == "running":
            entries = look.ranks[rank].entries
            return (entries.pid, entries.stacks) if entries.stacks else None
        if rank in look.newcomers and look.newcomers[rank].process == "running":
            notice = self.newcomers[rank]
            return (notice.pid, notice.stacks) if notice.stacks else None
        return None

    def close(self) -> None:
        for one in self.ranks.values():
            one.segment.close()


class Counts(NamedTuple):
    """How many processes have become ranks, and how many of these have ended."""

    begun: int
    ended: int


class ProgramWatcher:
    """For the use of one thread. A context manager: journals stay mapped until it ends."""

    def __init__(self, registry: Registry, patience_s: float) -> None:
        self._roster = registry
        self._patience_s = patience_s
        self._worlds: dict[str, _World] = {}
        self._newcomers: defaultdict[str, dict[int, NewcomerNotice]] = defaultdict(dict)
        self._by_pid: dict[int, tuple[_World, _Rank]] = {}
        self._num_looks = 0

    def counts(self) -> Counts:
        """Of the ranks so far, as far as their news were taken."""
        return Counts(len(self._by_pid), sum(rank.has_ended for _, rank in self._by_pid.values()))

    def __enter__(self) -> ProgramWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds.values():
            world.close()

    def look(self, now_ns: int, *, is_last: bool = False) -> list[Verdict]:
        """What is to be told now. Blocks for a second for each verdict, at most.

        With `is_last` what has ended is not waited for any more. Raises FrameError if the registry has been spoiled.
        """
        self.take_news()
        self._num_looks += 1
        is_whole = is_last or self._num_looks % LOOKS_A_WHOLE == 0
        most_records = NUM_RECORDS if is_whole else GLANCE_RECORDS
        told = []
        for name, world in list(self._worlds.items()):
            verdict = world.verdict(now_ns, most_records, self._patience_s, is_last=is_last)
            if verdict is not None:
                told.append(world.with_stacks(verdict, now_ns))
            if world.has_ended:
                self._worlds.pop(name).close()
                self._newcomers.pop(name, None)
        return told

    def end_ranks(self) -> None:
        """Kill all that are left."""
        for _, rank in self._by_pid.values():
            rank.end()

    def take_news(self) -> None:
        """See which processes have become ranks. Raises FrameError if the registry has been spoiled."""
        for notice in self._roster.news():
            if isinstance(notice, RankNotice):
                self._add(notice)
            elif isinstance(notice, NewcomerNotice):
                self._newcomers[notice.world][notice.rank] = notice
            else:
                self._add_lane(notice)

    def _add(self, notice: RankNotice) -> None:
        try:
            rank = _Rank(notice)
        except (PeerDiedError, FrameError) as error:
            log.warning("rank %d is not watched: %s", notice.rank, error)
            return
        world = self._worlds.get(notice.world)
        if world is not None and world.is_before(rank):
            world.close()
            world = None
            of_world = self._newcomers[notice.world]  # those that have ended were of the earlier start
            self._newcomers[notice.world] = {n: one for n, one in of_world.items() if _newcomer(one).process != "gone"}
        if world is None:
            world = self._worlds[notice.world] = _World(self._newcomers[notice.world])
        world.ranks[notice.rank] = rank
        self._by_pid[notice.journal.pid] = world, rank

    def _add_lane(self, notice: LaneNotice) -> None:
        if notice.pid not in self._by_pid:
            return
        world, rank = self._by_pid[notice.pid]
        rank.lanes[notice.index] = notice.name
        world.lanes.setdefault(notice.name, notice.ranks)
