"""What this process does in torch.distributed, as its journal has it: for programs that are not ours.

A program has no steps of its own, so all of it is one, until it says otherwise with `step`. A collective is issued when
it is called and done when the call returns; while somebody waits for its Work it is not done again. With NCCL, done
means given to the GPU.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from phalanx.collectives.torch_calls import Call
from phalanx.collectives.torch_rank import RankPlace, ranks_here, told_by_launcher
from phalanx.errors import PhalanxError
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.program import (
    ENDED_STEP,
    ENDING,
    JOINING,
    JOINING_INDEX,
    WHOLE_PROGRAM,
    joining_digest,
    joining_text,
    step_of,
)
from phalanx.ledger.record import rolled
from phalanx.ledger.registry import VARIABLE, LaneNotice, NewcomerNotice, Notice, RankNotice, RegistryEntry
from phalanx.ledger.stacks import offer_stacks
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SharedSegment

_WORLD_VARIABLES = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
CLAIMED = "PHALANX_RANK_PID"
"""Set by the process that is to be the rank of its environment: those that it starts inherit that, and are none."""

_MAX_KNOWN = 4096
_NO_NUMBER = 0

log = logging.getLogger("phalanx.ledger")


class _Lane:
    """See registry.LaneNotice."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.sequence = 0
        self.rolling = 0


class _Group:
    """A process group that this process is a member of."""

    def __init__(self, group: Any, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.rank: int = group.rank()
        is_world = group.group_desc == "default_pg"
        kind = "group" if group.group_desc in ("", "undefined") else group.group_desc
        self.name = "world" if is_world else f"{kind} {group.group_name}"
        self.lanes: dict[object, _Lane | None] = {}
        self.known: dict[Call, tuple[_Lane | None, int]] = {}


class TorchNotes:
    """For the use of all threads. Waits for nobody."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as is right for a process that was forked: what there was is its parent's."""
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._segment: SharedSegment | None = None
        self._roster: RegistryEntry | None = None
        self._is_unwatched = False
        self._groups: dict[int, tuple[weakref.ref[object], _Group | None]] = {}
        self._num_lanes = self._num_joined = 0
        self._names: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._failed: list[int] = []
        self._user_step: int | None = None

    @property
    def memory(self) -> memoryview:
        """The journal, once this process is a rank."""
        assert self._segment is not None
        return self._segment.buf

    def come(self) -> None:
        """Say that this process is to become a rank, if its environment says so and it is the first that was told."""
        me, place = Party.me("this process"), told_by_launcher(os.environ)
        if place is None or VARIABLE not in os.environ or os.environ.setdefault(CLAIMED, str(me.pid)) != str(me.pid):
            return
        is_main = threading.current_thread() is threading.main_thread()
        self._announce(
            NewcomerNotice(
                world=_world(),
                rank=place.rank,
                node=os.uname().nodename,
                pid=me.pid,
                start_time=me.start_time,
                stacks=offer_stacks() if is_main else 0,
            )
        )

    def begin(self, rank: int) -> None:
        """This process is a rank from now on, and says so to whoever watches. A second time does nothing."""
        with self._lock:
            if self._journal is None:
                self._begin(rank)

    def join(self, place: RankPlace) -> int:
        """The process has come to where ranks find each other. Returns the record's number, for `done`."""
        with self._lock:
            if self._journal is None:
                self._begin(place.rank, ranks_here(place, os.environ))
            assert self._journal is not None
            if not self._num_joined:
                everybody = tuple(range(place.size))
                self._announce(LaneNotice(pid=os.getpid(), index=JOINING_INDEX, name=JOINING, ranks=everybody))
            self._num_joined += 1
            digest = joining_digest(place.size)
            self._journal.explain(digest, lambda: joining_text(place.size))
            return self._journal.issue(JOINING_INDEX, self._num_joined, digest, digest)

    def issue(self, group: Any, call: Call) -> int:
        """A collective that is about to be called. Returns the record's number; 0 if there is none."""
        found = self._groups.get(id(group))
        member = found[1] if found is not None else self._join(group)
        if member is None:
            return _NO_NUMBER
        lane, digest = member.known.get(call) or self._learn(member, call)
        journal = self._journal
        if lane is None or journal is None:
            return _NO_NUMBER
        with self._lock:
            if self._failed:
                self._give_up()
            lane.sequence += 1
            lane.rolling = rolled(lane.rolling, digest)
            return journal.issue(lane.index, lane.sequence, digest, lane.rolling)

    def done(self, number: int) -> None:
        """The call has returned, or the wait is over."""
        if number and self._journal is not None:
            self._journal.done(number)

    def awaited(self, number: int) -> None:
        """Somebody waits for what has been called before."""
        if self._journal is not None:
            self._journal.undone(number)

    def failed(self, number: int) -> None:
        """It ended with an error: who it waited for is of interest until the program goes on to something else."""
        if number:
            with self._lock:
                self._failed.append(number)

    def step(self, number: int) -> None:
        """The program is in its step `number` from now on. Does nothing before this process is a rank."""
        with self._lock:
            self._user_step = number
            if self._journal is not None:
                self._journal.begin_step(step_of(number), step_of(number), 0)

    def end(self, how: str) -> None:
        """The process is about to end: in order if `how` is empty, else with the error that it says."""
        with self._lock:
            if self._journal is None:
                return
            if how:
                self._journal.explain(ENDING, lambda: how)
            else:
                self._journal.begin_step(ENDED_STEP, ENDED_STEP, 0)
                self._journal.enter("leaving")

    def _begin(self, rank: int, here: tuple[int, ...] = ()) -> None:
        segment = SharedSegment.create(JOURNAL_BYTES, f"journal of rank {rank}")
        self._segment = segment
        journal = Journal(segment.buf, int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) + 1)
        if threading.current_thread() is threading.main_thread():
            journal.offer_stacks(offer_stacks())
        step = WHOLE_PROGRAM if self._user_step is None else step_of(self._user_step)
        journal.begin_step(step, step, 0)
        journal.enter("stepping")
        notice = RankNotice(world=_world(), rank=rank, node=os.uname().nodename, journal=segment.handle, here=here)
        self._announce(notice)
        self._journal = journal

    def _announce(self, notice: Notice) -> None:
        """To whoever watches, if somebody does."""
        if VARIABLE not in os.environ or self._is_unwatched:
            return
        try:
            if self._roster is None:
                self._roster = RegistryEntry(os.environ)
            self._roster.announce(notice)
        except (PhalanxError, OSError) as error:
            self._is_unwatched = True
            log.warning("process %d is not watched: %s", os.getpid(), error)

    def _join(self, group: Any) -> _Group | None:
        if not dist.is_initialized():
            return None
        ranks = _ranks_of(group)
        if ranks is not None and self._journal is None:
            self.begin(dist.get_rank())
        member = _Group(group, ranks) if ranks is not None else None
        key = id(group)
        self._groups[key] = weakref.ref(group, lambda _: self._groups.pop(key, None)), member
        return member

    def _learn(self, member: _Group, call: Call) -> tuple[_Lane | None, int]:
        with self._lock:
            ends = self._ends(member, call)
            key: object = (call.device, ends, call.tag) if call.is_one_way else call.device
            if key not in member.lanes:
                member.lanes[key] = self._open_lane(_lane_name(member, call, ends), ends or member.ranks)
            lane, text = member.lanes[key], call.text(member.ranks)
            digest = call.digest(text)
            if self._journal is not None:
                self._journal.explain(digest, lambda: text)
            if len(member.known) == _MAX_KNOWN:
                member.known.clear()
            member.known[call] = lane, digest
            return lane, digest

    def _ends(self, member: _Group, call: Call) -> tuple[int, ...]:
        """Who sends to whom, if that is what it is."""
        ends = (call.source, call.destination) if call.is_one_way else ()
        return tuple(member.ranks[member.rank if end < 0 else end] for end in ends)

    def _open_lane(self, name: str, ranks: tuple[int, ...]) -> _Lane | None:
        if self._num_lanes == JOINING_INDEX - 1:
            if "" not in {name for name, _ in self._names}:
                self._names["", ()] += 1
                log.warning("no more than %d groups are recorded: not %s", JOINING_INDEX - 1, name)
            return None
        self._num_lanes += 1
        self._names[name, ranks] += 1
        times = self._names[name, ranks]  # a group may be destroyed and made again
        unique = name if times == 1 else f"{name} #{times}"
        self._announce(LaneNotice(pid=os.getpid(), index=self._num_lanes, name=unique, ranks=ranks))
        return _Lane(self._num_lanes)

    def _give_up(self) -> None:
        """The program has gone on after an error: it waits no more."""
        for number in self._failed:
            self.done(number)
        self._failed.clear()


def _world() -> str:
    """The same for all processes that were started together."""
    return " ".join(os.environ.get(name, "") for name in _WORLD_VARIABLES)


def _lane_name(member: _Group, call: Call, ends: tuple[int, ...]) -> str:
    name = member.name if call.device == "cpu" else f"{member.name} ({call.device})"
    if not ends:
        return name
    return f"{name}, {ends[0]} to {ends[1]}" + (f", tag {call.tag}" if call.tag else "")


def _ranks_of(group: Any) -> list[int] | None:
    """The members, None if they are not known or are none: a group of one's own making, or one for tests."""
    if group.size() == 1 or group.name() == "fake":
        return None
    try:
        return dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return None
