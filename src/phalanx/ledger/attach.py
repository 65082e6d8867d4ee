"""Looks at an instance from another process, which need not be asked: it may be stopped, or hang."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Literal

import msgspec

from phalanx.ledger.board import Notice, read_board
from phalanx.ledger.confirmation import Confirmation
from phalanx.ledger.elsewhere import NodeSeen, read_elsewhere
from phalanx.ledger.instance import Instance, server_of
from phalanx.ledger.journal_layout import NUM_RECORDS
from phalanx.ledger.journal_reader import read
from phalanx.ledger.look import Look, RankLook
from phalanx.ledger.report import VerdictReport, report, utc_now
from phalanx.ledger.stacks import STACKS, stack_of
from phalanx.ledger.status import InstanceStatus, instance_status, with_stacks
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.ledger.watcher import Watcher
from phalanx.transport.beacon import descriptors_of
from phalanx.transport.liveness import holds_memory, state_of
from phalanx.transport.shared_memory import SharedSegment

LOOKS_OF_A_JUDGE = 20
LOOK_S = 0.05
SILENT_WATCHER_S = 5.0
"""What a watcher found that has not looked for so long is not believed any more, unless it was final."""


class Attached:
    """An instance, its journals mapped until `close`: they stay readable when it has ended. For any thread."""

    def __init__(self, instance: Instance) -> None:
        """Raises PeerDiedError or FrameError if it has just ended."""
        self.instance = instance
        self._reading = threading.Lock()  # the board, which takes microseconds: /health must not wait for more
        self._looking = threading.Lock()
        self._board: memoryview | None = None
        self._journals: list[tuple[WatchedRank, memoryview]] = []
        self._elsewhere: memoryview | None = None
        with ExitStack() as undo:
            if instance.order is not None:
                self._journals = [
                    (one, undo.enter_context(SharedSegment.attach(one.journal)).buf) for one in instance.order.ranks
                ]
                if instance.order.outlets is not None:
                    board = instance.order.outlets.board
                    self._board = undo.enter_context(SharedSegment.attach(board)).buf
                    if (shown := instance.order.outlets.elsewhere) is not None:
                        self._elsewhere = undo.enter_context(SharedSegment.attach(shown)).buf
            self._stack = undo.pop_all()

    def notice(self) -> Notice:
        """What the instance's own watcher has written last. Takes microseconds."""
        with self._reading:
            notice = read_board(self._board) if self._board is not None else None
        return notice or Notice()

    def standing(self, awaits_since_ns: int | None = None) -> VerdictReport | None:
        """The verdict that stands, as the instance's own watcher says. `awaits_since_ns`: as in `standing_of`."""
        return standing_of(self.notice(), time.monotonic_ns(), awaits_since_ns)

    def verdict(self) -> VerdictReport | None:
        """The same; by our own looks, for a second, if that watcher does not look any more."""
        silence_s = silent_s(self.notice(), time.monotonic_ns())
        if self.instance.order is None or (silence_s is not None and silence_s < SILENT_WATCHER_S):
            return self.standing()
        return self.standing() or _judged(self.instance.order)

    def process(self) -> Literal["running", "stopped", "gone"]:
        """How the engine's process is."""
        return _process_of(self.instance.pid, self.instance.start_time)

    def ranks_left(self) -> list[int]:
        """Those of this host that may still hold memory, also if they have begun to exit."""
        with self._looking:
            found = [(one.rank, read(journal, 1)) for one, journal in self._journals]
        return [rank for rank, entries in found if entries.pid and holds_memory(entries.pid, entries.start_time)]

    def status(self, verdict: VerdictReport | None) -> InstanceStatus:
        """How all is now. Takes a millisecond or two for each rank."""
        now_ns = time.monotonic_ns()
        return instance_status(
            self.instance,
            self._look(now_ns, NUM_RECORDS),
            process=self.process(),
            now=time.time(),
            server=server_of(self.instance),
            verdict=verdict,
            watcher_s=silent_s(self.notice(), now_ns),
            elsewhere=self._nodes_elsewhere(now_ns),
        )

    def with_stacks(self, status: InstanceStatus) -> InstanceStatus:
        """The status, and where all processes are that can answer. Blocks for a second at most."""
        ranks = self._look(time.monotonic_ns(), 1).ranks
        asked = {
            rank: (one.entries.pid, one.entries.stacks)
            for rank, one in ranks.items()
            if one.process == "running" and one.entries.stacks
        }
        descriptors = descriptors_of(self.instance.pid, STACKS) if self.process() == "running" else []
        engine = [(self.instance.pid, descriptor) for descriptor in descriptors[:1]]
        with ThreadPoolExecutor(max(len(asked) + 1, 1)) as threads:
            found = list(threads.map(lambda one: stack_of(*one), [*engine, *asked.values()]))
        return with_stacks(status, dict(zip(asked, found[len(engine) :], strict=True)), found[0] if engine else ())

    def close(self) -> None:
        """May be called more than once."""
        with self._reading, self._looking:
            self._board, self._journals, self._elsewhere = None, [], None
            self._stack.close()

    def _nodes_elsewhere(self, now_ns: int) -> list[NodeSeen]:
        """As the instance's own watcher shows them. If it looks no more, nothing is heard of them."""
        with self._looking:
            nodes = read_elsewhere(self._elsewhere) if self._elsewhere is not None else ()
        return [
            msgspec.structs.replace(node, word="lost")
            if node.word == "heard" and now_ns - node.seen_ns > SILENT_WATCHER_S * 1e9
            else node
            for node in nodes
        ]

    def _look(self, now_ns: int, most_records: int) -> Look:
        """All ranks on this host that have begun. Only reads: the instance's own watcher notices nothing."""
        ranks = {}
        with self._looking:
            for one, journal in self._journals:
                entries = read(journal, most_records)
                if entries.pid:
                    process = _process_of(entries.pid, entries.start_time)
                    ranks[one.rank] = RankLook(
                        rank=one.rank, node=one.node, groups=one.groups, process=process, entries=entries
                    )
        return Look(now_ns, ranks, self.instance.order.groups if self.instance.order is not None else {})

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def standing_of(notice: Notice, now_ns: int, awaits_since_ns: int | None = None) -> VerdictReport | None:
    """The verdict on the board, if it is to be believed: whoever wrote it still looks, or it is the last one, or there
    was no step since the last look although requests wait for one, since `awaits_since_ns`. Of the monotonic clock."""
    if notice.verdict is None:
        return None
    looks = now_ns - notice.looked_ns <= SILENT_WATCHER_S * 1e9
    no_step = awaits_since_ns is not None and awaits_since_ns <= notice.looked_ns
    if not (looks or no_step or notice.verdict.is_final):
        return None
    return report(notice.verdict, notice.since_ns, now_ns, utc_now())


def silent_s(notice: Notice, now_ns: int) -> float | None:
    """Since the watcher has looked last; None if it never did."""
    return round(max(now_ns - notice.looked_ns, 0) / 1e9, 3) if notice.looked_ns else None


def _judged(order: WatchOrder) -> VerdictReport | None:
    confirmation = Confirmation()
    with Watcher(order) as watcher:
        for _ in range(LOOKS_OF_A_JUDGE):
            now_ns = time.monotonic_ns()
            confirmation.take(watcher.verdict(now_ns), now_ns)
            time.sleep(LOOK_S)
    found = confirmation.told
    if found is not None and found.is_of_a_wait and order.outlets is not None and order.outlets.elsewhere is not None:
        return None  # it may be for a rank on another node, of which nothing is known here
    return None if found is None else report(found, now_ns - int(found.waited_s * 1e9), now_ns, utc_now())


def _process_of(pid: int, start_time: int) -> Literal["running", "stopped", "gone"]:
    state = state_of(pid, start_time)
    return "gone" if state is None else "stopped" if state in "Tt" else "running"
