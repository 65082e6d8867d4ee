"""Watches the ranks of programs that are not ours, as they make themselves known, and says what is wrong.

Ranks that were started together are a world and are judged together. One that comes in place of an earlier one, as
after a restart, begins the world anew.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from typing import Literal

import msgspec

from phalanx.errors import FrameError, PeerDiedError
from phalanx.ledger.journal import NUM_RECORDS, Reader
from phalanx.ledger.program_verdict import ProgramLook, ProgramRank, judge_program
from phalanx.ledger.roster import LaneNotice, RankNotice, Roster
from phalanx.ledger.stacks import stack_of
from phalanx.ledger.verdict import Verdict
from phalanx.ledger.watcher import GLANCE_RECORDS, Confirmation
from phalanx.transport.liveness import state_of
from phalanx.transport.shared_memory import SharedSegment

LOOKS_A_WHOLE = 16
"""One of so many looks is at all records: a program may have gone on since it gave away what it waits for."""

log = logging.getLogger("phalanx.ledger")


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

    def end(self) -> None:
        """Kill its process, if that lives."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._pid)
            try:
                if state_of(self._pid, self._start_time) is not None:  # the pid means this process, still
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)

    def _process(self) -> Literal["running", "stopped", "gone"]:
        state = state_of(self._pid, self._start_time)
        if state is None:
            return "gone"
        return "stopped" if state in "Tt" else "running"


class _World:
    """Ranks that were started together."""

    def __init__(self) -> None:
        self.ranks: dict[int, _Rank] = {}
        self.lanes: dict[str, tuple[int, ...]] = {}
        self._confirmation = Confirmation()
        self._is_over = False

    def look(self, now_ns: int, most_records: int) -> ProgramLook:
        ranks = {rank: one.look(now_ns, most_records) for rank, one in self.ranks.items()}
        return ProgramLook(now_ns, ranks, dict(self.lanes))

    def verdict(self, now_ns: int, most_records: int, patience_s: float, *, is_last: bool) -> Verdict | None:
        """What is to be told now."""
        if self._is_over:
            return None
        found = judge_program(self.look(now_ns, most_records), patience_s)
        told = self._confirmation.take(found, now_ns)
        if is_last and found is not None and found.is_final:
            told = found
        self._is_over = told is not None and told.is_final
        return told

    def with_stacks(self, verdict: Verdict, now_ns: int) -> Verdict:
        """The verdict, and where the ranks are that it is about. Blocks for a second at most."""
        look, found = self.look(now_ns, 0), {}
        for rank in (*verdict.culprits[:1], *[rank for rank in verdict.waiting if rank not in verdict.culprits][:1]):
            one = look.ranks[rank]
            if one.process == "running" and one.entries.stacks:
                found[rank] = stack_of(one.entries.pid, one.entries.stacks)
        return msgspec.structs.replace(verdict, stacks={rank: lines for rank, lines in found.items() if lines})

    def close(self) -> None:
        for one in self.ranks.values():
            one.segment.close()


class ProgramWatcher:
    """For the use of one thread. A context manager: journals stay mapped until it ends."""

    def __init__(self, roster: Roster, patience_s: float) -> None:
        self._roster = roster
        self._patience_s = patience_s
        self._worlds: dict[str, _World] = {}
        self._by_pid: dict[int, tuple[_World, _Rank]] = {}
        self._num_looks = 0

    @property
    def has_ranks(self) -> bool:
        """Whether a process has become a rank so far."""
        return bool(self._by_pid)

    def __enter__(self) -> ProgramWatcher:
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds.values():
            world.close()

    def look(self, now_ns: int, *, is_last: bool = False) -> list[Verdict]:
        """What is to be told now. Blocks for a second for each verdict, at most.

        With `is_last` what has ended is not waited for any more. Raises FrameError if the roster has been spoiled.
        """
        self._take_news()
        self._num_looks += 1
        is_whole = is_last or self._num_looks % LOOKS_A_WHOLE == 0
        most_records = NUM_RECORDS if is_whole else GLANCE_RECORDS
        told = []
        for world in self._worlds.values():
            verdict = world.verdict(now_ns, most_records, self._patience_s, is_last=is_last)
            if verdict is not None:
                told.append(world.with_stacks(verdict, now_ns))
        return told

    def end_ranks(self) -> None:
        """Kill all that are left."""
        for _, rank in self._by_pid.values():
            rank.end()

    def _take_news(self) -> None:
        for notice in self._roster.news():
            if isinstance(notice, RankNotice):
                self._add(notice)
            else:
                self._add_lane(notice)

    def _add(self, notice: RankNotice) -> None:
        world = self._worlds.get(notice.world)
        if world is not None and notice.rank in world.ranks:
            world.close()
            world = None
        if world is None:
            world = self._worlds[notice.world] = _World()
        try:
            rank = world.ranks[notice.rank] = _Rank(notice)
        except (PeerDiedError, FrameError) as error:
            log.warning("rank %d is not watched: %s", notice.rank, error)
            return
        self._by_pid[notice.journal.pid] = world, rank

    def _add_lane(self, notice: LaneNotice) -> None:
        if notice.pid not in self._by_pid:
            return
        world, rank = self._by_pid[notice.pid]
        rank.lanes[notice.index] = notice.name
        world.lanes.setdefault(notice.name, notice.ranks)
