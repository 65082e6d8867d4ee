"""Looks at the journals of a node's ranks some tens of times a second, and says what is wrong.

It takes part in nothing that it judges: it maps the journals, reads /proc, and writes to one pipe. What there is to see
on other nodes their watchers tell it (other_nodes.py).

A verdict must have stood for a while before it is told, unless what it says cannot change any more. Of ranks that wait,
it is told when they have waited for longer than patience.py allows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import msgspec

from phalanx.ledger.confirmation import FULL_LOOK_S, Confirmation, finding
from phalanx.ledger.dump import Dumper
from phalanx.ledger.elsewhere import NodeSeen
from phalanx.ledger.endings import Endings
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.judge import gone, judge
from phalanx.ledger.look import HELD_S, Look, standings
from phalanx.ledger.other_nodes import OtherNodes
from phalanx.ledger.outlets import OpenOutlets
from phalanx.ledger.patience import LEAST_S, Patience
from phalanx.ledger.record import Record
from phalanx.ledger.stacks import stack_of
from phalanx.ledger.uneven import uneven_groups
from phalanx.ledger.verdict import Cause, Verdict
from phalanx.ledger.watch_order import WatchOrder, ended_before
from phalanx.ledger.watched import GLANCE_RECORDS, GLANCE_WAIT_S, STILL_S, Watched, process_of
from phalanx.transport.shared_memory import SharedSegment

ASK_S = 1.0
"""No other rank is asked for its stack after this."""

LONGEST_TRUST_S = 0.2
"""Ranks that all go on are looked at this often at least, or compared: what holds them up may yet be to come."""

SHORT_S = 1.0
"""Who has done one thing for longer may have taken too long for it, however it goes on."""

LONGEST_REST_S = 0.1
"""The same where some are idle, and have been: nothing wakes who looks when one of these is stopped."""

LEARN_S = 0.2

LASTING: frozenset[Cause] = frozenset({"gone", "diverged"})
"""What cannot change any more, however long one looks. What is hopeless cannot either, once all ranks have come to a
standstill: until then a rank that is on its way may show that another one is to blame."""

_NS = 1e9


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
                Watched(one, undo.enter_context(SharedSegment.attach(one.journal)).buf) for one in order.ranks
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
            if finding(found) != self._seen:
                self._seen, self._seen_ns = finding(found), look.now_ns
            self._found = found if found is not None and self._is_beyond_doubt(found, look) else None
            if found is None:
                self._harmless = uneven_groups(look)
        return self._found

    def end_of(self, ranks: Collection[int], now_ns: int) -> Verdict | None:
        """Of these ranks alone, if they have ended: others are being ended meanwhile, which is nobody's fault."""
        return gone(self.look(now_ns), ranks)

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
                is_there = entries.stacks and process_of(entries) == "running"
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


def _with_starvation(verdict: Verdict | None, look: Look) -> Verdict | None:
    """With how long those had no core that are waited for: of a collective, all that take part."""
    if verdict is None or not verdict.is_of_a_wait:
        return verdict
    awaited = verdict.culprits or (look.members(verdict.group) if verdict.group is not None else ())
    starved_s = max((look.ranks[rank].starved_s for rank in awaited if rank in look.ranks), default=0.0)
    return msgspec.structs.replace(verdict, starved_s=starved_s)


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
            if is_last:
                found = watcher.end_of(ended_before(stop), now_ns)
                if found is None:
                    return
            else:
                found = watcher.verdict(now_ns, has_ended=endings.has_one)
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
