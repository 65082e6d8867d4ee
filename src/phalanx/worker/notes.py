"""What a rank notes of its work: in its journal, for the ledger, and in digests, for who compares the ranks' steps."""

from __future__ import annotations

import logging
import mmap
import threading
import zlib
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

import msgspec

from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.journaled_exchange import JournaledExchange
from phalanx.collectives.stream_writes import StreamWrites
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import BEGUN_WORD, FINISHED_WORD, WORD_BYTES
from phalanx.ledger.pulse import Pulse
from phalanx.ledger.record import PlanSize
from phalanx.ledger.stacks import may_offer, offer_stacks
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigests
from phalanx.topology.grid import Grid
from phalanx.transport.shared_memory import SharedSegment

if TYPE_CHECKING:
    import torch

    from phalanx.collectives.agreement import Agreement
    from phalanx.collectives.exchange import Exchange
    from phalanx.collectives.group import Group
    from phalanx.collectives.spec import GroupSpec
    from phalanx.protocol.worker import Step
    from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.worker")


class RankNotes:
    """Of one rank, as far as its spec says that anybody reads them. For the use of the rank's thread."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Raises PeerDiedError or FrameError if those who would read them are gone."""
        self._groups = spec.groups
        self._replica = Grid.of(spec.config.parallel).coordinates(spec.rank).replica
        self._board = SharedSegment.attach(spec.board) if spec.board is not None else None
        self.digests = _step_digests(spec, self._board)
        """None if nobody compares what this rank issues."""
        self._segment = SharedSegment.attach(spec.journal) if spec.journal is not None else None
        self._journal = Journal(self._segment.buf, spec.epoch) if self._segment is not None else None
        self._pulse = self._offer_journal()

    def follow_device(self, device: torch.device) -> None:
        """Have a GPU write into the journal how far it is."""
        if self._journal is None or self._segment is None or device.type != "cuda":
            return
        try:
            writes = StreamWrites(self._segment.buf[: mmap.PAGESIZE], device)
        except (OSError, RuntimeError) as error:
            log.warning("the ledger cannot tell what a GPU was given from what it has done: %s", error)
            return
        self._journal.follow_device(writes.to(BEGUN_WORD * WORD_BYTES), writes.to(FINISHED_WORD * WORD_BYTES))

    def enter(self, phase: str) -> None:
        """The rank does this from now on."""
        if self._journal is not None:
            self._journal.enter(phase)

    def of_exchange(self, exchange: Exchange) -> Exchange:
        """The same, with waits in it noted."""
        return exchange if self._journal is None else JournaledExchange(exchange, self._journal)

    def joining(self, spec: GroupSpec) -> AbstractContextManager[object]:
        """While this group is being joined."""
        if self._journal is None or spec.size == 1:
            return nullcontext()
        return self._journal.joining(self._index(spec))

    def of_group(self, group: Group, spec: GroupSpec, agreed: Agreement | None) -> Group:
        """The same, with each collective noted, and agreed upon if that is asked for."""
        if spec.size == 1 or (self._journal is None and self.digests is None):
            return group
        return JournaledGroup(group, group_notes(self._index(spec), self._journal, self.digests), agreed)

    def begin_step(self, step: Step) -> int:
        """The decision that the rank follows from now on; gives the number of its record."""
        number = step.number + 1  # 0 is no step
        if self.digests is not None:
            self.digests.begin(number)
        if self._journal is None:
            return 0
        num_tokens = sum(plan.shape.num_tokens for plan in step.plans)
        shape = step.plans[self._replica].shape
        size = PlanSize(max(shape.num_tokens, 1), shape.num_rows, shape.num_samples)  # without a token it computes one
        return self._journal.begin_step(number, zlib.crc32(msgspec.msgpack.encode(step)), num_tokens, size)

    def leave_step(self) -> bytes:
        """All of it was issued: gives what that was, if that is compared."""
        if self._journal is not None:
            self._journal.leave_step()
        return self.digests.leave() if self.digests is not None else b""

    def end_step(self, record: int) -> None:
        """It is done."""
        if self._journal is not None:
            self._journal.done(record)

    @property
    def must_be_told(self) -> bool:
        """Whether the brain does not see by itself what was issued in a step, and has to be told."""
        return self.digests is not None and self._board is None

    def close(self) -> None:
        """Let go of the memory that they are in."""
        with ExitStack() as leaving:
            for segment in (self._segment, self._board):
                if segment is not None:
                    leaving.callback(segment.close)
            if self._pulse is not None:
                leaving.callback(self._pulse.close)

    def _index(self, spec: GroupSpec) -> int:
        return 1 + self._groups.index(spec)

    def _offer_journal(self) -> Pulse | None:
        """Let those who read the journal ask whether this rank's interpreter runs, and where it is."""
        if self._journal is None or self._segment is None:
            return None
        if threading.current_thread() is not threading.main_thread():
            return Pulse(self._segment.buf)
        journal = self._journal
        journal.offer_stacks(offer_stacks())
        return Pulse(self._segment.buf, lambda: None if may_offer() else journal.offer_stacks(0))


def _step_digests(spec: WorkerSpec, board: SharedSegment | None) -> StepDigests | None:
    if spec.config.executor.collective_guard == "off" or all(group.size == 1 for group in spec.groups):
        return None
    memory = board.buf if board is not None else memoryview(bytearray(BOARD_BYTES))
    return StepDigests(memory, len(spec.groups))
