"""What the ledger of this host's ranks needs before they start: journals, and what is to be watched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from phalanx.config import Config
from phalanx.ledger.dump import DumpOrder, prepare
from phalanx.ledger.journal import note_process, prepare_journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.limits import Limits
from phalanx.ledger.verdict import HOPELESS, Cause
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.liveness import Party
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.spec import WorkerSpec

log = logging.getLogger("phalanx.ledger")

NOT_YET: Mapping[int, Party] = {}
"""No process of any rank is known."""


def make_journals(
    ranks: Iterable[int], resources: ExitStack, processes: Mapping[int, Party] = NOT_YET
) -> dict[int, SegmentHandle]:
    """A journal for each of these ranks of this host, which this process holds, too, until `resources` are let go.

    `processes`: by rank, if they are there already. None, with a warning, if there is no such memory here.
    """
    try:
        return {rank: _make_journal(rank, processes.get(rank), resources) for rank in ranks}
    except OSError as error:
        log.warning("no ledger: there is no memory for journals: %s", error)
        return {}


def _make_journal(rank: int, process: Party | None, resources: ExitStack) -> SegmentHandle:
    segment = resources.enter_context(SharedSegment.create(JOURNAL_BYTES, f"journal of rank {rank}"))
    prepare_journal(segment.buf)
    if process is not None:
        note_process(segment.buf, process.pid, process.start_time)
    return segment.handle


def with_journals(specs: Sequence[WorkerSpec], resources: ExitStack) -> list[WorkerSpec]:
    """The same workers, each with a journal if there is memory for them."""
    journals = make_journals([spec.rank for spec in specs], resources)
    return [msgspec.structs.replace(spec, journal=journals.get(spec.rank)) for spec in specs]


def watch_order(specs: Sequence[WorkerSpec], dump: DumpOrder | None = None) -> WatchOrder:
    """To watch these workers, which are on this host and have journals."""
    groups = {group.name: group.ranks for spec in specs for group in spec.groups if group.size > 1}
    deadlines = specs[0].config.executor
    return WatchOrder(
        ranks=tuple(
            WatchedRank(
                rank=spec.rank,
                node=os.uname().nodename,
                groups=("", *(group.name for group in spec.groups)),
                journal=spec.journal,
            )
            for spec in specs
            if spec.journal is not None
        ),
        groups=groups,
        limits=Limits(step_timeout_s=deadlines.step_timeout_s, start_timeout_s=deadlines.start_timeout_s),
        dump=dump,
    )


def who_is_ended(config: Config, ends_after_s: Mapping[Cause, float]) -> Mapping[Cause, float]:
    """Less those whose ranks say it themselves, in the call that is wrong."""
    if config.executor.collective_guard != "strict":
        return ends_after_s
    return {cause: stands_s for cause, stands_s in ends_after_s.items() if cause not in HOPELESS}


def dump_order(config: Config) -> DumpOrder | None:
    """Where verdicts are to be dumped, if anywhere. Raises ConfigError if that is not possible."""
    directory = config.executor.ledger_dump
    if directory is None:
        return None
    prepare(directory)
    return DumpOrder(directory=os.path.abspath(directory), settings=config.changed())
