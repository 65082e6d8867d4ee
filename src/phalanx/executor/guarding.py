"""Compares what ranks say that they have issued in a step, before the step's tokens leave the brain.

A rank that answers for a step says it in its reply. The others write it to a board, memory that this process maps as
well, or, on other nodes, send it in a message of its own. What is not known by the time of a step's replies is compared
when it is, or with the next message of any rank.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from phalanx.errors import DivergedError
from phalanx.ledger.disagreement import Member, disagreement, explain
from phalanx.ledger.journal_reader import read
from phalanx.ledger.look import RankLook
from phalanx.ledger.step_digests import BOARD_BYTES, Issued, StepDigestReader, told
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.executor")


class Guarding:
    """What ranks have issued in the steps under way. Belongs to one thread."""

    def __init__(self, specs: Sequence[WorkerSpec], resources: ExitStack) -> None:
        """Maps the boards and journals of the ranks that have a board, until `resources` are let go."""
        self._groups: dict[str, list[Member]] = {}
        self._boards: dict[int, StepDigestReader] = {}
        self._journals: dict[int, memoryview] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._open: dict[int, dict[int, Issued]] = {}
        for spec in specs:
            for place, group in enumerate(spec.groups, start=1):
                if group.size > 1:
                    self._groups.setdefault(group.name, []).append(Member(spec.rank, place))
            if spec.board is not None:
                self._boards[spec.rank] = StepDigestReader(_mapped(spec.board, resources), len(spec.groups))
                if spec.journal is not None:
                    self._journals[spec.rank] = _mapped(spec.journal, resources)
                    self._names[spec.rank] = ("", *(group.name for group in spec.groups))
        self._num_ranks = len({member.rank for members in self._groups.values() for member in members})

    def take(self, rank: int, column: bytes) -> None:
        """What a rank says of a step; nothing, if `column` is empty. Compares all that is known by now.

        Raises DivergedError.
        """
        if column:
            issued = told(column)
            self._open.setdefault(issued.step, {})[rank] = issued
        for step in list(self._open):
            self._compare(step)

    def _compare(self, step: int) -> None:
        heard = self._open[step]
        issued = heard.copy()
        for rank, board in self._boards.items():
            if rank not in heard and (seen := board.read(step)) is not None:
                issued[rank] = seen
                if seen.has_left:
                    heard[rank] = seen
        if len(heard) == self._num_ranks:
            del self._open[step]
        for group, members in self._groups.items():
            # It is the same in nearly every step: that is for the quick to find.
            if len({issued[rank].words[place] for rank, place in members if rank in issued}) > 1:
                found = disagreement(step, group, members, issued)
                if found is not None:
                    raise self._explained(step, issued)

    def _explained(self, step: int, issued: Mapping[int, Issued]) -> DivergedError:
        """Of several groups, the one in which ranks diverged first."""
        found = [disagreement(step, group, members, issued) for group, members in self._groups.items()]
        ranks = {
            rank: RankLook(rank=rank, node="", groups=self._names[rank], process="running", entries=read(journal))
            for rank, journal in self._journals.items()
        }
        explained = [explain(one, ranks) for one in found if one is not None]
        return min(explained, key=lambda one: one.began_ns).error


def with_boards(specs: Sequence[WorkerSpec], here: Collection[int], resources: ExitStack) -> list[WorkerSpec]:
    """The same workers, where those of the ranks `here`, on this host, have a board that this process holds, too.

    None has one, with a warning, if there is no such memory here: then ranks send what they would write there.
    """
    try:
        boards = {
            rank: resources.enter_context(SharedSegment.create(BOARD_BYTES, f"board of rank {rank}")).handle
            for rank in here
        }
    except OSError as error:
        log.warning("what ranks have issued is sent in a message for each step: there is no memory for it: %s", error)
        boards = {}
    return [msgspec.structs.replace(spec, board=boards.get(spec.rank)) for spec in specs]


def _mapped(handle: SegmentHandle, resources: ExitStack) -> memoryview:
    return resources.enter_context(SharedSegment.attach(handle)).buf
