"""Where a watcher makes known what it sees, besides its log: the board, the file of events, what is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from phalanx.ledger.board import BoardWriter
from phalanx.ledger.elsewhere import ElsewhereWriter, NodeSeen
from phalanx.ledger.events import EventsFile, event_of
from phalanx.ledger.report import utc_now
from phalanx.ledger.verdict import Verdict
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment


class Outlets(msgspec.Struct, frozen=True, kw_only=True):
    """Where to."""

    board: SegmentHandle
    events: str | None
    """A file's path."""
    model: str
    elsewhere: SegmentHandle | None = None
    """None if all ranks are on this node."""


class OpenOutlets:
    """For one thread of the process that judges. A context manager."""

    def __init__(
        self, outlets: Outlets, num_ranks: int, standing: Verdict | None = None, num_restarts: int = 0
    ) -> None:
        """`standing`: what a watcher before has told, and was not over.

        Raises PeerDiedError or FrameError if the board's owner is gone, OSError if events cannot be written.
        """
        self._outlets = outlets
        self._standing = standing
        with ExitStack() as undo:
            board = undo.enter_context(SharedSegment.attach(outlets.board)).buf
            self._board = BoardWriter(board, num_ranks, standing, num_restarts)
            path = outlets.events
            self._events = undo.enter_context(EventsFile(path)) if path is not None else None
            self._elsewhere: ElsewhereWriter | None = None
            if outlets.elsewhere is not None:
                self._elsewhere = ElsewhereWriter(undo.enter_context(SharedSegment.attach(outlets.elsewhere)).buf)
            self._stack = undo.pop_all()

    def stands(self, verdict: Verdict | None, now_ns: int) -> None:
        """All ranks were looked at, and this stands; None if nothing is wrong. Called after each look."""
        if verdict is not self._standing:
            if self._standing is not None:
                self._write(self._standing, now_ns, is_over=True)
            self._standing = verdict
            self._board.post(verdict, now_ns - int(verdict.waited_s * 1e9) if verdict is not None else 0)
        self._board.looked(now_ns)

    def restarted(self, num_restarts: int) -> None:
        """So often watchers have been replaced by now, on all nodes. Called after each look."""
        self._board.restarted(num_restarts)

    def show(self, nodes_seen: Callable[[], tuple[NodeSeen, ...]], now_ns: int) -> None:
        """How ranks on other nodes are. Called after each look."""
        if self._elsewhere is not None:
            self._elsewhere.show(nodes_seen, now_ns)

    def tell(self, verdict: Verdict, now_ns: int) -> None:
        """Write the event of what stands since the last look, with stacks by now."""
        self._write(verdict, now_ns, is_over=False)

    def _write(self, verdict: Verdict, now_ns: int, *, is_over: bool) -> None:
        if self._events is None:
            return
        self._events.write(
            event_of(
                verdict,
                is_over=is_over,
                since_ns=self._board.since_ns,
                now_ns=now_ns,
                now=utc_now(),
                model=self._outlets.model,
                engine_pid=self._outlets.board.pid,
            )
        )

    def __enter__(self) -> OpenOutlets:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
