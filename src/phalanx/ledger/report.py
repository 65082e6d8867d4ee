"""A verdict for programs: what /health, events and `phalanx doctor --json` say. Pure."""

from __future__ import annotations

import datetime

import msgspec

from phalanx.ledger.verdict import Verdict


class VerdictReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong. Times of day are UTC."""

    cause: str
    """One of the ledger's causes; of the engine's own process `stopped` or `silent`."""
    culprits: tuple[int, ...] = ()
    """Ranks; none where it is the engine's own process."""
    nodes: tuple[str, ...] = ()
    """Of the culprits."""
    paragraph: str
    """In words, the culprit first."""
    since: datetime.datetime
    for_s: float
    step: int | None = None
    group: str | None = None
    sequence: int | None = None
    theirs: str | None = None
    """The collective of the culprit, if there is one."""
    peers: str | None = None
    """The collective that its peers are in."""
    waiting: tuple[int, ...] = ()
    is_ambiguous: bool = False
    """Whether it cannot be told which of the culprits it is."""


def report(verdict: Verdict, since_ns: int, now_ns: int, now: datetime.datetime) -> VerdictReport:
    """`since_ns` and `now_ns` are of the monotonic clock; `now` is the time of day at `now_ns`."""
    for_s = max(now_ns - since_ns, 0) / 1e9
    return VerdictReport(
        cause=verdict.cause,
        culprits=verdict.culprits,
        nodes=verdict.nodes,
        paragraph=paragraph(verdict),
        since=now - datetime.timedelta(seconds=for_s),
        for_s=round(for_s, 3),
        step=verdict.step,
        group=verdict.group,
        sequence=verdict.sequence,
        theirs=verdict.theirs,
        peers=verdict.peers,
        waiting=verdict.waiting,
        is_ambiguous=verdict.is_ambiguous,
    )


def paragraph(verdict: Verdict) -> str:
    """The verdict in one line, without stacks."""
    return str(msgspec.structs.replace(verdict, stacks={}))


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
