"""A trace for ui.perfetto.dev, in the Trace Event format (JSON).

A process for each rank; in it a track for its steps and one for each group. A collective is a slice, tied by a flow to
the same one of the other members; the verdict is an instant over all. Times are microseconds from the first record on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import msgspec

from phalanx.ledger.after import Trace
from phalanx.ledger.look import RankLook
from phalanx.ledger.record import Kind, Record

STEPS, PHASES = 0, 999
"""Tracks of a rank; each group's is its index."""

Args = dict[str, str | int | None]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The format's own names."""

    ph: str
    """X: a slice. M: a name. s, t, f: a flow's start, way and end. i: an instant."""
    name: str
    pid: int
    tid: int
    ts: float
    dur: float | None = None
    cat: str | None = None
    id: int | None = None
    bp: str | None = None
    """e: a flow is tied to the slice around it."""
    s: str | None = None
    """g: an instant is drawn over all tracks."""
    args: Args | None = None


class File(msgspec.Struct, frozen=True):
    """The whole of it."""

    traceEvents: list[Event]
    displayTimeUnit: str = "ms"


def perfetto(trace: Trace) -> bytes:
    """The file's content."""
    times = [record.issued_ns for one in trace.look.ranks.values() for record in one.entries.records]
    return msgspec.json.encode(File(list(_Timeline(trace, min(times, default=trace.look.now_ns)).events())))


class _Timeline:
    def __init__(self, trace: Trace, zero_ns: int) -> None:
        self._look, self._verdict, self._zero_ns = trace.look, trace.verdict, zero_ns

    def events(self) -> Iterator[Event]:
        for one in self._look.ranks.values():
            yield from self._names(one)
            yield from (self._slice(one, record) for record in one.entries.records)
            if one.entries.phase_since_ns:
                yield self._phase(one)
        yield from self._flows()
        if self._verdict is not None:
            yield self._told()

    def _names(self, one: RankLook) -> Iterator[Event]:
        where = f" on {one.node}" if one.node else ""
        yield _name("process_name", one.rank, STEPS, {"name": f"rank {one.rank}{where}"})
        yield _name("process_sort_index", one.rank, STEPS, {"sort_index": one.rank})
        tracks = {STEPS: "steps"} if any(record.kind == Kind.STEP for record in one.entries.records) else {}
        tracks |= {i: name for i, name in enumerate(one.groups) if one.rank in self._look.groups.get(name, ())}
        if one.entries.phase_since_ns:
            tracks[PHASES] = "phase"
        for track, name in tracks.items():
            yield _name("thread_name", one.rank, track, {"name": name})
            yield _name("thread_sort_index", one.rank, track, {"sort_index": track})

    def _slice(self, one: RankLook, record: Record) -> Event:
        is_step = record.kind == Kind.STEP
        args: Args = {"step": record.step, "epoch": record.epoch, "digest": f"{record.digest:016x}"}
        if is_step:
            name = f"step {record.step}"
            args["tokens"] = record.sequence
        else:
            name, _, shape = one.text(record).partition(" ")
            args |= {"sequence": record.sequence, "group": one.groups[record.group], "shape": shape}
        if not record.is_done:
            args["open"] = "had not ended when the dump was made"
        ended_ns = record.done_ns or max(self._look.now_ns, record.issued_ns)
        return Event(
            ph="X",
            name=name,
            cat="step" if is_step else "collective",
            pid=_pid(one.rank),
            tid=_tid(one.rank, STEPS if is_step else record.group),
            ts=self._us(record.issued_ns),
            dur=_us(ended_ns - record.issued_ns),
            args=args,
        )

    def _phase(self, one: RankLook) -> Event:
        since_ns = max(one.entries.phase_since_ns, self._zero_ns)
        return Event(
            ph="X",
            name=one.entries.phase,
            cat="phase",
            pid=_pid(one.rank),
            tid=_tid(one.rank, PHASES),
            ts=self._us(since_ns),
            dur=_us(max(self._look.now_ns - since_ns, 0)),
            args={"process": one.process},
        )

    def _flows(self) -> Iterator[Event]:
        """From the first that came to a collective, over the others, to the last."""
        met: dict[tuple[str, int], list[tuple[RankLook, Record]]] = defaultdict(list)
        for one in self._look.ranks.values():
            for record in one.entries.records:
                if record.kind == Kind.COLLECTIVE:
                    met[one.groups[record.group], record.sequence].append((one, record))
        for number, members in enumerate((members for members in met.values() if len(members) > 1), start=1):
            members.sort(key=lambda member: member[1].issued_ns)
            for i, (one, record) in enumerate(members):
                yield Event(
                    ph="s" if i == 0 else "f" if i == len(members) - 1 else "t",
                    name="collective",
                    cat="collective",
                    id=number,
                    bp="e",
                    pid=_pid(one.rank),
                    tid=_tid(one.rank, record.group),
                    ts=self._us(record.issued_ns),
                )

    def _told(self) -> Event:
        verdict = self._verdict
        assert verdict is not None
        rank = (*verdict.culprits, *self._look.groups.get(verdict.group or "", ()), *self._look.ranks, 0)[0]
        groups = self._look.ranks[rank].groups if rank in self._look.ranks else ()
        track = groups.index(verdict.group) if verdict.group in groups else STEPS
        return Event(
            ph="i",
            s="g",
            name=f"verdict: {verdict.cause}" + "".join(f", rank {culprit}" for culprit in verdict.culprits),
            cat="verdict",
            pid=_pid(rank),
            tid=_tid(rank, track),
            ts=self._us(self._look.now_ns),
            args={"verdict": str(verdict), "step": verdict.step, "sequence": verdict.sequence},
        )

    def _us(self, time_ns: int) -> float:
        return _us(time_ns - self._zero_ns)


def _name(kind: str, rank: int, track: int, args: Args) -> Event:
    return Event(ph="M", name=kind, pid=_pid(rank), tid=_tid(rank, track), ts=0.0, args=args)


def _pid(rank: int) -> int:
    return rank + 1  # 0 is the kernel's idle process to Perfetto


def _tid(rank: int, track: int) -> int:
    return _pid(rank) * 1000 + track + 1


def _us(duration_ns: int) -> float:
    return duration_ns / 1e3
