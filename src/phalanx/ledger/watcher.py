"""Looks at the journals of a node's ranks some tens of times a second, and says what is wrong.

It takes part in nothing that it judges: it maps the journals, reads /proc, and writes to one pipe. What there is to see
on other nodes their watchers tell it (other_nodes.py).

A verdict must have stood for a while before it is told, unless what it says cannot change any more. Of ranks that wait,
it is told when they have waited for longer than patience.py allows.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Literal

import msgspec

from phalanx.ledger.dump import Dumper, DumpOrder
from phalanx.ledger.elsewhere import NodeSeen
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.journal_reader import Entries, Reader
from phalanx.ledger.judge import judge
from phalanx.ledger.limits import Limits
from phalanx.ledger.look import HELD_S, Look, RankLook, standings
from phalanx.ledger.other_nodes import OtherNodes, OtherNodesOrder
from phalanx.ledger.outlets import OpenOutlets, Outlets
from phalanx.ledger.patience import LEAST_S, Patience
from phalanx.ledger.pulse import Asker, ThreadTimes, starved_ns, threads_times
from phalanx.ledger.record import Record
from phalanx.ledger.stacks import stack_of
from phalanx.ledger.uneven import uneven_groups
from phalanx.ledger.verdict import Cause, Verdict
from phalanx.transport.liveness import state_of
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

_STOP_BYTES = 1 << 16
LOOK_S = 0.05
ASK_S = 1.0
"""No other rank is asked for its stack after this."""

LONGEST_TRUST_S = 0.2
"""Ranks that all go on are looked at this often at least, or compared: what holds them up may yet be to come."""

SHORT_S = 1.0
"""Who has done one thing for longer may have taken too long for it, however it goes on."""

LONGEST_REST_S = 0.1
"""The same where some are idle, and have been: nothing wakes who looks when one of these is stopped."""

STILL_S = 0.01
"""A rank in a step that has noted nothing for so long is looked at: as long as all is well, it does so all the time."""

FULL_LOOK_S = 0.1
"""All records are read this often at most, and only while something is suspicious."""

LEARN_S = 0.2

GLANCE_RECORDS = 16
"""Of each rank, as long as nothing is suspicious: enough for ranks that are a few collectives apart to overlap."""

GLANCE_WAIT_S = 0.2
"""A rank that has waited for less is not suspicious."""

MAY_END = ("not begun", "starting", "leaving")
"""Phases in which a rank that ends has said so, or says why by another way."""

LASTING: frozenset[Cause] = frozenset({"gone", "diverged"})
"""What cannot change any more, however long one looks. What is hopeless cannot either, once all ranks have come to a
standstill: until then a rank that is on its way may show that another one is to blame."""

STANDS_S: Mapping[Cause, float] = {
    "gone": 0,
    "diverged": 0,
    "gil": 0,
    "lost": 0,
    "store": 0,
    "overdue": 0,
    "stopped": 0.5,
    "skipped": 0.01,
    "circle": 0.01,
}
"""How long a verdict must have been the same before it is told: nothing where a duration is what it says, and two looks
where ranks are seen at different moments."""

OTHERS_STAND_S = FULL_LOOK_S
"""So that all records have been read twice."""

OVER_S = 0.2
"""For how long nothing must be wrong before a verdict is over."""

LONGEST_LOOK_S = 0.5
"""From one look to the next. After a longer pause a verdict has to stand anew."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_NS = 1e9


class WatchedRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of this node."""

    rank: int
    node: str
    groups: tuple[str, ...]
    """Names, by their index in its records."""
    journal: SegmentHandle


class WatchOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a watcher is to watch."""

    ranks: tuple[WatchedRank, ...]
    groups: dict[str, tuple[int, ...]]
    """The members of each group."""
    limits: Limits = Limits()
    outlets: Outlets | None = None
    dump: DumpOrder | None = None
    """Where verdicts are written, with all that the journals say."""
    other_nodes: OtherNodesOrder | None = None
    """None if all ranks are on this node."""
    standing: Verdict | None = None
    """What a watcher before this one has told, and was not over."""
    num_restarts: int = 0
    """How many there have been before this one."""

    @property
    def num_ranks(self) -> int:
        """On all nodes."""
        others = self.other_nodes.ranks.values() if self.other_nodes is not None else ()
        return len(self.ranks) + sum(map(len, others))


class _Watched:
    """One rank, from look to look."""

    def __init__(self, order: WatchedRank, journal: memoryview) -> None:
        self.order = order
        self.reader = Reader(journal)
        self._asker = Asker(journal)
        self._entries: Entries | None = None
        self._moved = (0, 0)
        self._still: _Still | None = None

    def passes(self, now_ns: int) -> Literal["goes on", "rests", "stands"]:
        """What it does, without a look. goes on: it notes something all the time. rests: it has been idle since it was
        looked at."""
        if self._is_ending():
            return "stands"
        if self.reader.is_idle:
            return "rests" if self.reader.moved == self._moved else "goes on"
        return "goes on" if now_ns - self.reader.noted_ns < STILL_S * _NS else "stands"

    def _is_ending(self) -> bool:
        """A process with a GPU is long about its end, and nobody is woken before that is over."""
        known = self._entries
        return known is not None and known.device is not None and _process_of(known) in ("gone", "ended")

    def look(self, now_ns: int, most_records: int) -> RankLook | None:
        """None if the rank has not begun."""
        moved, self._moved = self._moved, self.reader.moved
        has_moved = moved != self._moved
        entries = self._read(most_records, has_moved)
        if not entries.pid:
            return None
        process = _process_of(entries)
        if process == "gone":  # it may have said that it leaves after it was read, and before it was looked for
            entries = self.reader.read(most_records)
            process = _process_of(entries)
        still = self._note_still(entries, now_ns, has_moved, is_whole=most_records > GLANCE_RECORDS)
        cpu_s, starved_s = still.until(entries, now_ns) if still is not None else (0.0, 0.0)
        return RankLook(
            rank=self.order.rank,
            node=self.order.node,
            groups=self.order.groups,
            process=process,
            entries=entries,
            held_s=self._asker.held_s(entries, now_ns) if process == "running" else 0.0,
            still_s=(now_ns - still.since_ns) / _NS if still is not None else 0.0,
            cpu_s=cpu_s,
            starved_s=starved_s,
        )

    def _read(self, most_records: int, has_moved: bool) -> Entries:
        """What was read before will do for a rank that is idle and has been."""
        known = self._entries
        if known is None or has_moved or known.phase != "idle" or most_records > GLANCE_RECORDS:
            known = self._entries = self.reader.read(most_records)
        return known

    def _note_still(self, entries: Entries, now_ns: int, has_moved: bool, *, is_whole: bool) -> _Still | None:
        """From when on it has been seen to note nothing; while it is idle only as long as something is suspicious."""
        is_of_interest = is_whole or entries.phase != "idle"
        if has_moved:
            self._still = None
        elif self._still is None and is_of_interest:
            self._still = _Still(now_ns, _cpu_s(entries))
        return self._still if is_of_interest else None


class _Still(msgspec.Struct):
    """A rank that notes nothing."""

    since_ns: int
    cpu_s: float
    """That it had computed by then."""
    threads: dict[int, ThreadTimes] | None = None
    """From `threads_ns` on. There may be hundreds, which nobody looks at for a step that takes a moment."""
    threads_ns: int = 0

    def until(self, entries: Entries, now_ns: int) -> tuple[float, float]:
        """What the rank has computed since, and for how long one of its threads has waited for a core."""
        if now_ns <= self.since_ns:
            return 0.0, 0.0
        starved_s = 0.0
        if self.threads is not None:
            starved_s = starved_ns(entries, self.threads, now_ns - self.threads_ns) / _NS
        elif now_ns - self.since_ns >= GLANCE_WAIT_S * _NS:
            self.threads, self.threads_ns = threads_times(entries.pid), now_ns
        return max(_cpu_s(entries) - self.cpu_s, 0.0), starved_s


class Watcher:
    """For the use of one thread. A context manager: the journals stay mapped until it ends."""

    def __init__(self, order: WatchOrder) -> None:
        """Raises PeerDiedError or FrameError if a journal's owner is gone."""
        self._order = order
        self._patience = Patience(order.limits)
        self._glanced_ns = self._looked_ns = self._learned_ns = 0
        self._found: Verdict | None = None
        self._seen: object = None
        """What the last look at all records has found, beyond doubt or not..."""
        self._seen_ns = 0
        """... and when it was seen first."""
        self._harmless: dict[str, tuple[int, ...]] = {}
        """Groups that are uneven, and why is no concern of anybody."""
        self._stack = ExitStack()
        with ExitStack() as undo:
            others = order.other_nodes
            self._others = undo.enter_context(OtherNodes(others)) if others is not None else None
            self._ranks = [
                _Watched(one, undo.enter_context(SharedSegment.attach(one.journal)).buf) for one in order.ranks
            ]
            self._stack = undo.pop_all()
        self._readers = [watched.reader for watched in self._ranks]
        self._are_alike = len({one.groups for one in order.ranks}) == 1
        """Whether all ranks are in the same groups."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, now_ns: int, most_records: int = NUM_RECORDS) -> Look:
        """All ranks that have begun, now; those of other nodes as they were a moment ago, which then is its time."""
        looks = (watched.look(now_ns, most_records) for watched in self._ranks)
        ranks = {one.rank: one for one in looks if one is not None}
        if self._others is None:
            return Look(now_ns, ranks, self._order.groups, self._order.limits)
        self._others.take(now_ns, [one.entries.step for one in ranks.values()])
        ranks.update(self._others.looks(most_records))
        seen_ns, unheard, unwatched = self._others.seen_ns(now_ns), self._others.unheard(), self._others.unwatched()
        return Look(seen_ns, ranks, self._order.groups, self._order.limits, unheard, unwatched)

    def verdict(self, now_ns: int, *, has_ended: bool = False) -> Verdict | None:
        """What is wrong, if that is beyond doubt: it cannot change any more, or ranks have waited for long.

        `has_ended`: a rank may have, so that looking cannot wait.
        """
        if not has_ended and self._is_trusted(now_ns):
            return None
        self._glanced_ns = now_ns
        self._learn(now_ns)
        at_a_glance = self.look(now_ns, GLANCE_RECORDS)
        glance = judge(at_a_glance)
        if self._is_harmless(glance, at_a_glance):
            self._found = self._seen = None
        elif self._cannot_change(glance, at_a_glance) or now_ns - self._looked_ns >= FULL_LOOK_S * _NS:
            self._looked_ns = now_ns
            if self._others is not None and not self._others.have_told_all():
                return self._found  # neither over nor another, as far as is known
            look = self.look(now_ns)
            found = _with_starvation(judge(look), look)
            if _finding(found) != self._seen:
                self._seen, self._seen_ns = _finding(found), look.now_ns
            self._found = found if found is not None and self._is_beyond_doubt(found, look) else None
            if found is None:
                self._harmless = uneven_groups(look)
        return self._found

    def with_stacks(self, verdict: Verdict) -> Verdict:
        """The verdict, with what all ranks do, and where those are that it is about. Blocks for a second at most."""
        look = self.look(time.monotonic_ns(), GLANCE_RECORDS)
        waiting = [rank for rank in verdict.waiting if rank not in verdict.culprits]
        stacks = self.stacks((*verdict.culprits, *waiting[:1]))
        return msgspec.structs.replace(verdict, stacks=stacks, standings=standings(look))

    def stacks(self, ranks: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Where these ranks are, as far as they answer. Blocks for a second at most."""
        found: dict[int, tuple[str, ...]] = {}
        if self._others is None:
            self._ask_own(ranks, found)
        else:
            found.update(self._others.stacks(ranks, meanwhile=lambda: self._ask_own(ranks, found)))
        return {rank: found[rank] for rank in ranks if rank in found}

    def steps(self) -> dict[int, tuple[Record, ...]]:
        """The records of steps that the ranks of this node have."""
        return {watched.order.rank: watched.reader.steps() for watched in self._ranks}

    def nodes_seen(self) -> tuple[NodeSeen, ...]:
        """The other nodes, as they were heard last."""
        return self._others.seen(GLANCE_RECORDS) if self._others is not None else ()

    @property
    def num_restarts_elsewhere(self) -> int:
        """How often the watchers of other nodes have been replaced."""
        return self._others.num_restarts if self._others is not None else 0

    def pids(self) -> list[int]:
        """Of the ranks that have begun."""
        return [pid for watched in self._ranks if (pid := watched.reader.pid)]

    def all_go_on(self, now_ns: int) -> bool:
        """Whether nothing is wrong and all ranks note something all the time, so that it is not yet time for `verdict`.

        This is what is done most often, beside ranks that leave nothing in the caches.
        """
        is_known = self._found is None and self._others is None
        return is_known and now_ns - self._glanced_ns < LONGEST_TRUST_S * _NS and self._do_something(now_ns)

    def _do_something(self, now_ns: int) -> bool:
        """Whether each rank has just noted something, and is not far ahead of a device with it."""
        since_ns = now_ns - int(STILL_S * _NS)
        return all(reader.notes_since(since_ns) for reader in self._readers)

    def _is_trusted(self, now_ns: int) -> bool:
        """Whether nothing can be wrong, or as good as nothing."""
        passing = {watched.passes(now_ns) for watched in self._ranks}
        if "stands" in passing or self._found is not None or self._others is not None:
            return False
        since_s = (now_ns - self._glanced_ns) / _NS
        if "rests" in passing:
            return since_s < LONGEST_REST_S
        if since_s < LONGEST_TRUST_S:
            return True
        if not self._go_the_same_way(now_ns):
            return False
        self._glanced_ns = now_ns
        self._learn(now_ns)
        return True

    def _go_the_same_way(self, now_ns: int) -> bool:
        """Whether a glance would find that all ranks do the same, and nothing else: False says little.

        Only of ranks that are in the same groups, and that all do something now.
        """
        readers = self._readers
        if not self._are_alike or not self._do_something(now_ns):
            return False
        if any(now_ns - reader.phase_since_ns >= SHORT_S * _NS for reader in readers):
            return False
        last = min(reader.last for reader in readers)
        first = max(1, last - GLANCE_RECORDS + 1)
        if len({reader.noted(first, last) for reader in readers}) > 1 or len({one.plans() for one in readers}) > 1:
            return False
        # Ranks that are on their way may be a collective apart.
        return len({reader.sequences() for reader in readers}) == 1 or not all(reader.is_idle for reader in readers)

    def _learn(self, now_ns: int) -> None:
        if now_ns - self._learned_ns < LEARN_S * _NS:
            return
        self._learned_ns = now_ns
        for watched in self._ranks:
            rank = watched.order.rank
            self._patience.learn(rank, watched.reader.steps(self._patience.learned(rank)))
        for rank, records in self._others.steps().items() if self._others is not None else ():
            self._patience.learn(rank, records)

    def _ask_own(self, ranks: Sequence[int], found: dict[int, tuple[str, ...]]) -> None:
        expires_at = time.monotonic() + ASK_S  # for all together: nobody is looked at meanwhile
        for watched in self._ranks:
            if watched.order.rank in ranks:
                entries = watched.reader.read(0)
                is_there = entries.stacks and _process_of(entries) == "running"
                if not is_there or time.monotonic() > expires_at:
                    continue
                if lines := stack_of(entries.pid, entries.stacks):
                    found[watched.order.rank] = lines

    def _is_harmless(self, glance: Verdict | None, look: Look) -> bool:
        """Whether there is nothing for which to read all records: nor in groups that are uneven and were not before."""
        if uneven_groups(look) not in ({}, self._harmless) or self._cannot_change(glance, look):
            return False
        return glance is None or (glance.is_of_a_wait and glance.waited_s < GLANCE_WAIT_S)

    def _cannot_change(self, verdict: Verdict | None, look: Look) -> bool:
        """Other nodes are seen as they were a moment ago: what ranks there and here are in may never have been at the
        same time."""
        if verdict is None:
            return False
        is_lasting = verdict.is_hopeless and self._others is None and look.is_at_a_standstill
        return verdict.cause in LASTING or is_lasting

    def _is_beyond_doubt(self, verdict: Verdict, look: Look) -> bool:
        """A rank that had no core for a while has that much longer; a collective, if any of those in it had none.

        What ranks are ended for at once is seen twice: records that are read while ranks write them, or that came over
        a network at different moments, may fit together by chance once.
        """
        if not verdict.is_of_a_wait or self._cannot_change(verdict, look):
            return True
        if verdict.is_hopeless and look.now_ns <= self._seen_ns:
            return False
        if verdict.cause == "late" and any(0.0 < look.ranks[rank].held_s < HELD_S for rank in verdict.culprits):
            return False  # it was asked whether its interpreter runs, and will have answered in a moment, or never
        return verdict.waited_s - verdict.starved_s >= self._patience_s(verdict, look)

    def _patience_s(self, verdict: Verdict, look: Look) -> float:
        """How long a step takes is no excuse for who is idle and does not begin it."""
        is_idle = verdict.cause in ("behind", "slow") and all(
            look.ranks[rank].is_between_steps for rank in verdict.culprits
        )
        return LEAST_S if is_idle else self._patience.of_s(look)


class Confirmation:
    """Lets a verdict through once, when it has stood for a while: one look may have caught ranks on their way."""

    def __init__(self, told: Verdict | None = None) -> None:
        self.told = told
        """What has been told and still stands."""
        self._pending: object = None
        self._stands_s = OVER_S
        self._since_ns = self._looked_ns = 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has been told, or is about to be."""
        return self.told is None and self._pending is None

    @property
    def next_look_s(self) -> float:
        """When to look again: soon, if only that is missing for a verdict to be told."""
        return min(LOOK_S, self._stands_s) if self._pending != _identity(self.told) else LOOK_S

    def take(self, verdict: Verdict | None, now_ns: int) -> Verdict | None:
        """What was found at a look, None if nothing. Returns it if it is to be told now."""
        was_away = now_ns - self._looked_ns > LONGEST_LOOK_S * _NS  # then all may have been stopped, this process too
        self._looked_ns = now_ns
        identity = _identity(verdict)
        if identity != self._pending or was_away:
            self._pending, self._since_ns = identity, now_ns
            self._stands_s = OVER_S if verdict is None else STANDS_S.get(verdict.cause, OTHERS_STAND_S)
        if identity == _identity(self.told) or now_ns - self._since_ns < self._stands_s * _NS:
            return None
        self.told = verdict
        return verdict


def _finding(verdict: Verdict | None) -> object:
    """What it says of whom."""
    return verdict and (verdict.cause, verdict.culprits, verdict.group, verdict.sequence)


def _identity(verdict: Verdict | None) -> object:
    # Who waits for a core comes when it has one, and who does not may never come.
    return verdict and (_finding(verdict), verdict.is_of_a_busy_host)


def _with_starvation(verdict: Verdict | None, look: Look) -> Verdict | None:
    """With how long those had no core that are waited for: of a collective, all that take part."""
    if verdict is None or not verdict.is_of_a_wait:
        return verdict
    awaited = verdict.culprits or (look.members(verdict.group) if verdict.group is not None else ())
    starved_s = max((look.ranks[rank].starved_s for rank in awaited if rank in look.ranks), default=0.0)
    return msgspec.structs.replace(verdict, starved_s=starved_s)


def _process_of(entries: Entries) -> Literal["running", "stopped", "gone", "ended"]:
    state = state_of(entries.pid, entries.start_time)
    if state is None:
        return "gone" if entries.phase not in MAY_END else "ended"
    return "stopped" if state in "Tt" else "running"


def _cpu_s(entries: Entries) -> float:
    """What a rank's process has computed so far."""
    try:
        with open(f"/proc/{entries.pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return 0.0
    user, system = stat[stat.rindex(b")") + 2 :].split()[11:13]
    return (int(user) + int(system)) * _TICK_S


class Endings:
    """Waits between looks, and not to the end when a rank ends. A context manager."""

    def __init__(self) -> None:
        self.has_one: bool = False
        """Whether the last wait was for less long because a rank had ended."""
        self._pidfds: dict[int, int] = {}
        self._poll = select.poll()

    def __enter__(self) -> Endings:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self._pidfds.values():
            if pidfd >= 0:
                os.close(pidfd)

    def wait(
        self,
        stop: int,
        pids: list[int],
        at_most_s: float = LOOK_S,
        all_go_on: Callable[[int], bool] | None = None,
    ) -> bool:
        """Whether it is time to stop; else returns after so long, or as soon as one of the processes has ended. Waits
        again as long as `all_go_on`."""
        for pid in pids:
            if pid not in self._pidfds:
                self._add(pid)
        self._poll.register(stop, select.POLLIN)
        at_most_ms = at_most_s * 1000
        while not (found := self._poll.poll(at_most_ms)) and all_go_on is not None and all_go_on(time.monotonic_ns()):
            pass
        ready = [descriptor for descriptor, _ in found]
        self.has_one = bool(set(ready) - {stop})
        for pid, pidfd in self._pidfds.items():
            if pidfd in ready:
                self._poll.unregister(pidfd)
                os.close(pidfd)
                self._pidfds[pid] = -1
        return stop in ready

    def _add(self, pid: int) -> None:
        self._pidfds[pid] = -1
        with suppress(OSError):  # it has ended; or the kernel has no such thing, and a look will tell
            self._pidfds[pid] = pidfd = os.pidfd_open(pid)
            self._poll.register(pidfd, select.POLLIN)


def stop_word(ended: Iterable[int]) -> bytes:
    """What to write for a watcher to stop: these ranks have ended before, by themselves, and are to be told of."""
    return b" ".join((b"!", *(b"%d" % rank for rank in sorted(ended))))


def _ended_before(stop: int) -> frozenset[int]:
    """Nobody if `stop` is closed."""
    return frozenset(int(rank) for rank in os.read(stop, _STOP_BYTES).split()[1:])


def _is_of(found: Verdict | None, ended: Collection[int]) -> bool:
    """Whether it tells of these alone: others are ended meanwhile, which is nobody's fault."""
    return found is not None and found.cause == "gone" and set(found.culprits) <= set(ended)


def watch(order: WatchOrder, stop: int, verdicts: int, beat: Callable[[], None] = lambda: None) -> None:
    """Write verdicts, a line of JSON each, to the descriptor `verdicts`; `null` when one does not hold any more. Calls
    `beat` before each look.

    Returns after one that no other can follow, or when `stop` closes or is written to: then after a last look if that
    says (`stop_word`) that ranks have ended before, since both may be seen at once.
    """
    confirmation = Confirmation(order.standing)
    with ExitStack() as stack:
        dumper = stack.enter_context(Dumper(order.dump))
        watcher, endings = stack.enter_context(Watcher(order)), stack.enter_context(Endings())
        outlets = None
        if order.outlets is not None:
            opened = OpenOutlets(order.outlets, order.num_ranks, order.standing, order.num_restarts)
            outlets = stack.enter_context(opened)
        is_last = False
        while not is_last:
            is_last = endings.wait(
                stop, watcher.pids(), confirmation.next_look_s, watcher.all_go_on if confirmation.is_quiet else None
            )
            beat()
            now_ns = time.monotonic_ns()
            before = confirmation.told
            found = watcher.verdict(now_ns, has_ended=endings.has_one)
            if is_last and not _is_of(found, _ended_before(stop)):
                return
            verdict = confirmation.take(found, now_ns)
            if outlets is not None:
                outlets.stands(confirmation.told, now_ns)
                outlets.restarted(order.num_restarts + watcher.num_restarts_elsewhere)
                outlets.show(watcher.nodes_seen, now_ns)
            if verdict is not None:
                verdict = verdict if is_last else watcher.with_stacks(verdict)  # its ranks are being killed
                look = watcher.look(time.monotonic_ns())  # now: for the verdict ranks may be killed
                os.write(verdicts, msgspec.json.encode(verdict) + b"\n")
                if outlets is not None:
                    outlets.tell(verdict, now_ns)
                dumper.take(look, verdict)
                if verdict.is_final:
                    return
            elif before is not None and confirmation.told is None:
                os.write(verdicts, b"null\n")
