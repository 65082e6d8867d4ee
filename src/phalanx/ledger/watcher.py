"""Looks at the journals of a node's ranks some tens of times a second, and says what is wrong.

It takes part in nothing that it judges: it maps the journals, reads /proc, and writes to one pipe.

A verdict must have stood for a while before it is told, unless what it says cannot change any more. Of ranks that wait
that is PATIENCE_S or STEPS_OF_PATIENCE times the time that steps usually take, whichever is longer.
"""

from __future__ import annotations

import os
import select
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal

import msgspec

from phalanx.ledger.dump import Dumper, DumpOrder
from phalanx.ledger.journal import NUM_RECORDS, Entries, read
from phalanx.ledger.record import Kind
from phalanx.ledger.stacks import stack_of
from phalanx.ledger.verdict import Look, RankLook, Verdict, judge
from phalanx.transport.liveness import state_of
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

LOOK_S = 0.03
PATIENCE_S = 1.0
PATIENCE_AT_FIRST_S = 10.0
"""Until steps have been made: the first one of a run may have much to set up."""

STEPS_OF_PATIENCE = 20

GLANCE_RECORDS = 16
"""Of each rank, as long as nothing is suspicious: enough for ranks that are a few collectives apart to overlap."""

GLANCE_WAIT_S = 0.2
"""A rank that has waited for less is not suspicious."""

MAY_END = ("not begun", "starting", "leaving")
"""Phases in which a rank that ends has said so, or says why by another way."""

CONFIRMED_AFTER_S = 0.2
LONGEST_LOOK_S = 0.5
"""From one look to the next. After a longer pause a verdict has to stand anew."""

LASTING = ("gone", "diverged")
"""What cannot change any more, however long one looks."""


class WatchedRank(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of this node."""

    rank: int
    node: str
    groups: tuple[str, ...]
    """Names, by their index in its records."""
    journal: SegmentHandle


class WatchOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a watcher is to watch."""

    ranks: tuple[WatchedRank, ...]
    groups: dict[str, tuple[int, ...]]
    """The members of each group."""
    dump: DumpOrder | None = None
    """Where verdicts are written, with all that the journals say."""


class Watcher:
    """For the use of one thread. A context manager: the journals stay mapped until it ends."""

    def __init__(self, order: WatchOrder) -> None:
        """Raises PeerDiedError or FrameError if a journal's owner is gone."""
        self._order = order
        self._stack = ExitStack()
        with ExitStack() as undo:
            self._journals = {
                one.rank: undo.enter_context(SharedSegment.attach(one.journal)).buf for one in order.ranks
            }
            self._stack = undo.pop_all()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def look(self, now_ns: int, most_records: int = NUM_RECORDS) -> Look:
        """All ranks that have begun, now."""
        ranks = {}
        for one in self._order.ranks:
            entries = read(self._journals[one.rank], most_records)
            if entries.pid:
                ranks[one.rank] = RankLook(
                    rank=one.rank, node=one.node, groups=one.groups, process=_process_of(entries), entries=entries
                )
        return Look(now_ns, ranks, self._order.groups)

    def verdict(self, now_ns: int) -> Verdict | None:
        """What is wrong, if that is beyond doubt: it cannot change any more, or ranks have waited for long."""
        glance = judge(self.look(now_ns, GLANCE_RECORDS))
        if glance is None or (glance.cause not in LASTING and glance.waited_s < GLANCE_WAIT_S):
            return None
        look = self.look(now_ns)
        verdict = judge(look)
        if verdict is None or verdict.cause in LASTING or verdict.waited_s >= _patience_s(look.ranks):
            return verdict
        return None

    def with_stacks(self, verdict: Verdict) -> Verdict:
        """The verdict, and where the ranks are that it is about. Blocks for a second at most."""
        return msgspec.structs.replace(verdict, stacks=_stacks(verdict, self.look(time.monotonic_ns(), 1)))


class Confirmation:
    """Lets a verdict through once, when it has stood for a while: one look may have caught ranks on their way."""

    def __init__(self) -> None:
        self._told: set[object] = set()
        self._pending: object = None
        self._since_ns = self._looked_ns = 0

    def take(self, verdict: Verdict | None, now_ns: int) -> Verdict | None:
        """What was found at a look, None if nothing. Returns it if it is to be told now."""
        was_away = now_ns - self._looked_ns > LONGEST_LOOK_S * 1e9  # then all may have been stopped, this process too
        self._looked_ns = now_ns
        if verdict is None:
            self._pending = None
            return None
        identity = (verdict.cause, verdict.culprits, verdict.group, verdict.sequence)
        if identity in self._told:
            return None
        if identity != self._pending or was_away:
            self._pending, self._since_ns = identity, now_ns
        if verdict.cause not in LASTING and now_ns - self._since_ns < CONFIRMED_AFTER_S * 1e9:
            return None
        self._told.add(identity)
        return verdict


def _stacks(verdict: Verdict, look: Look) -> dict[int, tuple[str, ...]]:
    """Where the culprits are, and one of those that wait for them."""
    found = {}
    for rank in (*verdict.culprits, *[rank for rank in verdict.waiting if rank not in verdict.culprits][:1]):
        one = look.ranks[rank]
        if one.process == "running" and one.entries.stacks and (lines := stack_of(one.entries.pid, one.entries.stacks)):
            found[rank] = lines
    return found


def _process_of(entries: Entries) -> Literal["running", "stopped", "gone"]:
    state = state_of(entries.pid, entries.start_time)
    if state is None:
        return "gone" if entries.phase not in MAY_END else "running"
    return "stopped" if state in "Tt" else "running"


def _patience_s(ranks: Mapping[int, RankLook]) -> float:
    took_ns = [
        record.done_ns - record.issued_ns
        for one in ranks.values()
        for record in one.entries.records
        if record.kind == Kind.STEP and record.is_done
    ]
    return max(PATIENCE_S, STEPS_OF_PATIENCE * statistics.median(took_ns) / 1e9) if took_ns else PATIENCE_AT_FIRST_S


def watch(order: WatchOrder, stop: int, verdicts: int) -> None:
    """Write verdicts, a line of JSON each, to the descriptor `verdicts`.

    Returns after one that no other can follow, or when `stop` closes.
    """
    confirmation = Confirmation()
    with Dumper(order.dump) as dumper, Watcher(order) as watcher:
        while not select.select([stop], [], [], LOOK_S)[0]:
            now_ns = time.monotonic_ns()
            verdict = confirmation.take(watcher.verdict(now_ns), now_ns)
            if verdict is not None:
                verdict = watcher.with_stacks(verdict)
                look = watcher.look(time.monotonic_ns())  # now: for the verdict ranks may be killed
                os.write(verdicts, msgspec.json.encode(verdict) + b"\n")
                dumper.take(look, verdict)
                if verdict.is_final:
                    return
