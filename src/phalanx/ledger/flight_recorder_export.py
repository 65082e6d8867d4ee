"""Our dumps as Flight Recorder dumps, for torchfrtrace and what else reads these.

Our groups have no backend that torch knows; they are called gloo's. What torch has no name for is left out.
torchfrtrace drops what is older than the newest of all ranks' oldest records, going by numbers that are each rank's own
here. So each group begins where all its members still have it, and records are counted anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from phalanx.ledger.after import Trace
from phalanx.ledger.flight_recorder import Entry, Frame, ProcessGroup, Recording, Status
from phalanx.ledger.look import Look, RankLook
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.recorded import DTYPES

FORMAT = "2.10"
"""What torch 2.11 to 2.13 write."""

_TEXT = re.compile(r"(?P<operation>\w+)(?: (?P<dtype>\w+) (?P<shape>\[[\d, ]*\]))?(?: dim=(?P<dim>\d+))?(?: \w+=\d+)?")
_KNOWN = (
    "all_reduce",
    "all_gather",
    "broadcast",
    "barrier",
    "reduce_scatter",
    "all_to_all",
    "reduce",
    "gather",
    "scatter",
)
_FRAME = re.compile(r"(?P<file>.*):(?P<line>\d+) in (?P<function>.*)")
_CORE_DTYPES = {name: core for core, name in DTYPES.items()}
_BACKEND = "gloo"
_NO_DESCRIPTION = "undefined"


def recordings_of(trace: Trace) -> tuple[dict[int, Recording], int]:
    """Of each rank; and how many records were left out, as torch has no name for what they stand for."""
    look, left_out = trace.look, 0
    begins = {group: _beginning(look, group) for group in look.groups}
    recordings = {}
    for rank, one in look.ranks.items():
        kept = [
            record
            for record in one.entries.records
            if record.kind == Kind.COLLECTIVE and record.sequence >= begins.get(one.groups[record.group], 1 << 64)
        ]
        known = [record for record in kept if _is_known(one.text(record))]
        left_out += len(kept) - len(known)
        recordings[rank] = _recording(trace, one, known)
    return recordings, left_out


def _beginning(look: Look, group: str) -> int:
    """The first sequence that no member has lost."""
    firsts = []
    for rank in look.groups[group]:
        if rank in look.ranks:
            one = look.ranks[rank]
            sequences = one.collectives(group)
            firsts.append(min(sequences, default=one.entries.sequences[one.groups.index(group)] + 1))
    return max(firsts, default=1)


def _is_known(text: str) -> bool:
    found = _TEXT.fullmatch(text)
    return found is not None and found["operation"] in _KNOWN


def _recording(trace: Trace, one: RankLook, records: Sequence[Record]) -> Recording:
    entries = [_entry(trace, one, record, number) for number, record in enumerate(records)]
    if entries and trace.verdict is not None and one.rank in trace.verdict.stacks:  # where it is now
        frames = [_frame(line) for line in trace.verdict.stacks[one.rank]]
        entries[-1] = msgspec.structs.replace(entries[-1], frames=frames)
    groups = [name for name in one.groups if name in trace.look.groups]
    return Recording(
        version=FORMAT,
        comm_lib_version="phalanx",
        entries=entries,
        pg_config={name: ProcessGroup(name, _NO_DESCRIPTION, str(list(trace.look.groups[name]))) for name in groups},
        pg_status={name: _status(one, name) for name in groups},
    )


def _entry(trace: Trace, one: RankLook, record: Record, number: int) -> Entry:
    group = one.groups[record.group]
    found = _TEXT.fullmatch(one.text(record))
    assert found is not None
    given, made = _sizes(found, len(trace.look.groups[group]))
    dtypes = [_CORE_DTYPES.get(found["dtype"], found["dtype"])] if given else []
    return Entry(
        record_id=number,
        process_group=(group, _NO_DESCRIPTION),
        collective_seq_id=record.sequence,
        op_id=record.sequence,
        profiling_name=f"{_BACKEND}:{found['operation']}",
        time_created_ns=record.issued_ns + trace.unix_ns,
        input_sizes=given,
        output_sizes=made,
        input_dtypes=dtypes,
        output_dtypes=dtypes,
        state="completed" if record.is_done else "started",
        time_discovered_started_ns=record.issued_ns + trace.unix_ns,
        time_discovered_completed_ns=record.done_ns + trace.unix_ns if record.is_done else None,
        retired=record.is_done,
        pg_id=record.group,
    )


def _sizes(found: re.Match[str], num_members: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of input and output: ours name the input's."""
    if found["shape"] is None:
        return [], []
    given = msgspec.json.decode(found["shape"], type=list[int])
    made = list(given)
    if found["operation"] == "all_gather" and made:
        made[int(found["dim"] or 0)] *= num_members
    if found["operation"] == "reduce_scatter" and made:
        made[0] //= num_members
    return [given], [made]


def _status(one: RankLook, group: str) -> Status:
    collectives = one.collectives(group)
    newest = one.entries.sequences[one.groups.index(group)]
    over = max((sequence for sequence, record in collectives.items() if record.is_done), default=newest)
    return Status(newest, newest, over)


def _frame(line: str) -> Frame:
    found = _FRAME.fullmatch(line)
    return Frame(line) if found is None else Frame(found["function"], found["file"], int(found["line"]))
