"""Flight Recorder dumps as our judge looks at them: a record for each collective, in groups with members.

- A collective's place is its group's collective_seq_id. Several entries of one place were issued as one.
- Each direction between two ranks is a group of its own: point-to-point operations are counted from the first one on,
  so they are judged only if both ranks' buffers still have the beginning.
- NCCL's watchdog says what has completed. Gloo's entries are only `retired`, when they are over *or have failed*: one
  that a member has not come to cannot be over, if nobody can leave it before all have come.
- Gloo's dumps do not say who is in a group (torch 2.13): taken to be who has used it, and of the
  default one all ranks up to the highest that has left a dump.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from phalanx.ledger.after import Trace, verdict_of
from phalanx.ledger.flight_recorder import Entry, Recording, Recordings
from phalanx.ledger.journal_reader import Entries
from phalanx.ledger.look import Look, RankLook
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.verdict import Verdict

DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "Float8_e4m3fn": "float8_e4m3fn",
    "Float8_e5m2": "float8_e5m2", "UInt16": "uint16", "UInt32": "uint32", "UInt64": "uint64",
}  # fmt: skip
"""Torch's own names of dtypes here, by those of its core."""

_ONLY_STEP = 1
_DEFAULT = "default_pg"
_ALL_COME_FIRST = (
    "all_reduce",
    "allreduce",
    "all_gather",
    "_all_gather_base",
    "all_to_all",
    "barrier",
    "reduce_scatter",
)
"""What no rank leaves before all have come to it."""


class _Place(NamedTuple):
    """Where an operation is: in which group, and the how manieth."""

    group: str
    sequence: int


class _Operation(NamedTuple):
    """What one rank did at one place."""

    place: _Place
    entries: list[Entry]
    text: str
    compared: str
    """Is the same on all ranks that do the same."""
    is_over: bool

    @property
    def first(self) -> Entry:
        return self.entries[0]

    @property
    def must_meet(self) -> bool:
        """Whether what is over shows that all have come."""
        return self.first.profiling_name.partition(":")[2].startswith(_ALL_COME_FIRST)

    @property
    def is_gloo(self) -> bool:
        return self.first.profiling_name.startswith("gloo:")


def trace_of(found: Recordings) -> Trace:
    """The verdict on them, and all that it rests on."""
    recordings = found.ranks
    groups = _Groups(recordings)
    operations = {rank: list(_operations(rank, one, groups)) for rank, one in recordings.items()}
    notes = [*groups.notes]
    members = {**groups.members, **{pair: groups.pairs[pair] for pair in sorted(groups.pairs)}}
    for name, ranks in members.items():
        operations = _reopened(operations, name, ranks)
    look = _look(operations, members, found.written_ns)
    missing = tuple(sorted({rank for ranks in members.values() for rank in ranks} - set(recordings)))
    notes += [f"there is no dump of rank{'s'[: len(missing) > 1]} {_in_ranges(missing)}"] if missing else []
    verdict = verdict_of(look, frozenset(missing))
    if verdict is not None:
        verdict = _told(verdict, look, operations)
    return Trace("flight recorder", look, 0, verdict, missing, tuple(notes))


def _in_ranges(ranks: Sequence[int]) -> str:
    """Such as `1, 4 to 7`."""
    starts = [rank for place, rank in enumerate(ranks) if place == 0 or ranks[place - 1] != rank - 1]
    ends = [rank for place, rank in enumerate(ranks) if place == len(ranks) - 1 or ranks[place + 1] != rank + 1]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


class _Groups:
    """Who is in which group. Names are those that the user sees: name and description of the process group."""

    def __init__(self, recordings: Mapping[int, Recording]) -> None:
        self.members: dict[str, tuple[int, ...]] = {}
        self.pairs: dict[str, tuple[int, ...]] = {}
        self.notes: list[str] = []
        self._recordings = recordings
        groups = [group for one in recordings.values() for group in one.pg_config.values()]
        self._highest = max(*recordings, *(rank for group in groups for rank in group.members), 0)
        """Rank that is told of."""
        self._names: dict[tuple[int, tuple[str, str]], str] = {}
        self._cut = {rank for rank, one in recordings.items() if one.entries and one.entries[0].record_id > 0}
        for rank, one in recordings.items():
            for key in dict.fromkeys(entry.process_group for entry in one.entries):
                self._add(rank, key, one)
            for group in one.pg_config.values():
                if group.members and rank in group.members:
                    self._add(rank, (group.name, group.desc), one)

    def of(self, rank: int, entry: Entry) -> str:
        return self._names[rank, entry.process_group]

    def pair(self, group: str, source: int, destination: int) -> str | None:
        """The group that is one direction between two ranks of a group; None if their beginnings are not known."""
        cut = sorted({source, destination} & self._cut)
        if cut:
            note = f"point-to-point operations of rank {cut[0]} are not judged: its buffer has lost the first of them"
            if note not in self.notes:
                self.notes.append(note)
            return None
        name = f"{group} {source}->{destination}"
        self.pairs[name] = (source, destination)
        return name

    def _add(self, rank: int, key: tuple[str, str], recording: Recording) -> None:
        name = ":".join(part for part in key if part and part != "undefined")
        config = recording.pg_config.get(key[0])
        members = config.members if config is not None and config.desc == key[1] else ()
        if not members:
            members = self._users(key)
            note = f"the dumps do not say who is in group {name}: taken to be ranks {_in_ranges(members)}"
            if note not in self.notes:
                self.notes.append(note)
        if self.members.setdefault(name, members) != members:  # the name stands for other ranks elsewhere
            name = f"{name} of {', '.join(map(str, members))}"
            self.members[name] = members
        self._names[rank, key] = name

    def _users(self, key: tuple[str, str]) -> tuple[int, ...]:
        if key[1] == _DEFAULT:
            return tuple(range(self._highest + 1))
        return tuple(
            rank for rank, one in self._recordings.items() if any(entry.process_group == key for entry in one.entries)
        )


def _operations(rank: int, recording: Recording, groups: _Groups) -> Iterator[_Operation]:
    """In the order in which they were issued."""
    together: dict[tuple[tuple[str, str], bool, int], list[Entry]] = defaultdict(list)
    for entry in recording.entries:
        sequence = entry.p2p_seq_id if entry.is_p2p else entry.collective_seq_id
        together[entry.process_group, entry.is_p2p, sequence].append(entry)
    counts: dict[str, int] = defaultdict(int)
    for (_, is_p2p, sequence), entries in together.items():
        name = groups.of(rank, entries[0])
        if not is_p2p:
            parts = [entry for entry in entries if not entry.is_bracket] or entries
            text = "; ".join(_text(entry) for entry in parts)
            compared = "; ".join(_compared(entry) for entry in parts)
            yield _Operation(_Place(name, sequence), entries, text, compared, _is_over(entries[-1]))
            continue
        for entry in entries:
            if entry.is_bracket:
                continue
            ends = _ends(entry, groups.members[name])
            pair = groups.pair(name, *ends) if ends is not None else None
            if pair is not None:
                counts[pair] += 1
                sizes = entry.input_sizes if "send" in entry.profiling_name else entry.output_sizes
                dtypes = entry.input_dtypes if "send" in entry.profiling_name else entry.output_dtypes
                place, compared = _Place(pair, counts[pair]), f"{pair} {_tensors(dtypes, sizes)}"
                yield _Operation(place, [entry], _text(entry), compared, _is_over(entries[-1]))


def _ends(entry: Entry, members: Sequence[int]) -> tuple[int, int] | None:
    """Source and destination of a point-to-point operation, as ranks of the program; None if one is not known."""
    if entry.ends is None or max(entry.ends) >= len(members):  # a rank without a file, where members are not told
        return None
    source, destination = entry.ends
    return members[source], members[destination]


def _is_over(entry: Entry) -> bool:
    return entry.state == "completed" or (entry.retired and entry.profiling_name.startswith("gloo:"))


def _text(entry: Entry) -> str:
    """As our own journals have it: operation, dtype, shape."""
    given, made = (
        _tensors(entry.input_dtypes, entry.input_sizes),
        _tensors(entry.output_dtypes, entry.output_sizes),
    )
    operation = entry.profiling_name.partition(":")[2]
    return " ".join(part for part in (operation, given if given == made or not made else f"{given} -> {made}") if part)


def _compared(entry: Entry) -> str:
    """Without what may differ between ranks."""
    operation = entry.profiling_name.partition(":")[2]
    given, made = str(entry.input_sizes), str(entry.output_sizes)
    if operation.startswith("all_to_all") or operation.endswith(("_v", "_oop")):
        given = made = ""
    elif operation.startswith("scatter"):
        given = ""
    elif operation.startswith("gather"):
        made = ""
    return f"{operation} {entry.input_dtypes if given else ''} {given} {entry.output_dtypes if made else ''} {made}"


def _tensors(dtypes: Iterable[str], sizes: Iterable[Sequence[int]]) -> str:
    names = [DTYPES.get(dtype, dtype) for dtype in dtypes]
    shapes = [str(list(shape)) for shape in sizes]
    if len(set(names)) == 1:
        return f"{names[0]} {', '.join(shapes)}"
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=False)) or ", ".join(shapes)


def _reopened(
    operations: Mapping[int, list[_Operation]], group: str, members: Sequence[int]
) -> dict[int, list[_Operation]]:
    """What Gloo calls over, though a member has not come to it, has failed.

    Of a member that has left no dump that is taken to be the last that the others have come to.
    """
    newest = [
        max((one.place.sequence for one in operations[rank] if one.place.group == group), default=0)
        for rank in members
        if rank in operations
    ]
    least = min(newest, default=0) - (len(newest) < len(members))
    return {
        rank: [
            one._replace(is_over=False)
            if one.place.group == group and one.place.sequence > least and one.is_gloo and one.must_meet
            else one
            for one in of_rank
        ]
        for rank, of_rank in operations.items()
    }


def _look(operations: Mapping[int, list[_Operation]], members: Mapping[str, Sequence[int]], written_ns: int) -> Look:
    names = ("", *members)
    entries = [entry for of_rank in operations.values() for one in of_rank for entry in one.entries]
    return Look(
        _now_ns(entries, written_ns), {rank: _rank_look(rank, ops, names) for rank, ops in operations.items()}, members
    )


def _now_ns(entries: Sequence[Entry], written_ns: int) -> int:
    """When the files were written, if they have not been copied since: no wait is longer than its time-out."""
    latest = max((max(one.time_created_ns, one.time_discovered_completed_ns or 0) for one in entries), default=0)
    longest_ms = max((one.timeout_ms for one in entries), default=0)
    return max(latest, min(written_ns, latest + longest_ms * 1_000_000))


def _rank_look(rank: int, operations: Sequence[_Operation], names: tuple[str, ...]) -> RankLook:
    sequences = [0] * len(names)
    records, texts = [], dict[int, str]()
    for one in operations:
        group, digest = names.index(one.place.group), _digest(one.compared)
        sequences[group] = max(sequences[group], one.place.sequence)
        texts.setdefault(digest, one.text)
        records.append(_record(one, group, digest))
    open_ones = [record for record in records if not record.is_done]
    if open_ones:  # what it is in is the oldest that is open: what it issued after that waits behind it
        records.remove(open_ones[0])
        records.append(open_ones[0])
    entries = Entries(
        pid=0,
        start_time=0,
        stacks=0,
        phase="elsewhere",
        phase_since_ns=0,
        step=_ONLY_STEP,
        sequences=tuple(sequences),
        records=tuple(records),
        texts=texts,
    )
    return RankLook(rank=rank, node="", groups=names, process="running", entries=entries)


def _record(one: _Operation, group: int, digest: int) -> Record:
    ended_ns = one.entries[-1].time_discovered_completed_ns or one.first.time_created_ns
    return Record(
        number=one.first.record_id + 1,
        epoch=0,
        group=group,
        kind=Kind.COLLECTIVE,
        step=_ONLY_STEP,
        sequence=one.place.sequence,
        digest=digest,
        rolling=0,
        issued_ns=one.first.time_created_ns,
        done_ns=ended_ns if one.is_over else 0,
    )


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _told(verdict: Verdict, look: Look, operations: Mapping[int, list[_Operation]]) -> Verdict:
    """Without steps, of which nothing is known, and with the stacks from which the collectives were issued."""
    place = _Place(verdict.group or "", verdict.sequence or 0)
    what = verdict.what
    if verdict.cause == "late" and (culprit := verdict.culprits[0]) in look.ranks:
        own = [one for one in operations[culprit] if one.place.group == place.group]
        last = (
            f"the last that it issued there is {own[-1].text} ({own[-1].place.sequence})" if own else "and to no other"
        )
        what = f"has not come to {verdict.peers}: {last}"
    stacks = {}
    for rank in (*verdict.culprits, *[rank for rank in _others(look, place) if rank not in verdict.culprits][:1]):
        issued = [one for one in operations.get(rank, ()) if one.place == place] or list(operations.get(rank, ()))[-1:]
        if issued and issued[0].first.frames:
            stacks[rank] = tuple(map(str, issued[0].first.frames))
    return msgspec.structs.replace(verdict, step=None, what=what, stacks=stacks)


def _others(look: Look, place: _Place) -> list[int]:
    """Members that have come to the place."""
    return [
        rank for rank in look.groups.get(place.group, ()) if rank in look.ranks and look.ranks[rank].has_issued(*place)
    ]
