"""How an instance is at one moment: every rank, where it stands in each of its groups, and whom it waits for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from phalanx.ledger.instance import Instance, ServerFacts
from phalanx.ledger.look import Look, RankLook, wait_of
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.report import VerdictReport
from phalanx.ledger.watcher import WatchedRank

Process = Literal["not begun", "running", "stopped", "gone", "ended"]
Mark = Literal["", "culprit", "waits", "awaited"]
"""culprit: as the verdict has it. waits: in this collective, which others have not come to. awaited: others are in one
that it has not come to."""


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's newest collective in one of its groups."""

    group: str
    sequence: int
    """0 before the first."""
    operation: str | None = None
    """None if its journal does not have it any more."""
    is_in: bool = False
    """Whether it is in it now."""
    for_s: float | None = None
    """Since it began if the rank is in it, since its end otherwise."""
    step: int | None = None
    mark: Mark = ""


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    node: str
    process: Process
    is_culprit: bool = False
    """As the verdict has it."""
    pid: int | None = None
    phase: str = "not begun"
    phase_s: float | None = None
    step: int = 0
    """That it is in, or was in last."""
    step_s: float | None = None
    """How long it has been in that step; None if it is in none."""
    groups: tuple[GroupStatus, ...] = ()
    waits_in: str | None = None
    """What it is in that others have to come to: a collective, or the joining of a group. None if it is in neither."""
    waits_for: tuple[int, ...] = ()
    """Ranks that have not come there."""
    stack: tuple[str, ...] | None = None
    """Lines of Python, innermost first; empty if it did not answer, None if it was not asked."""


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    """Of the engine's process."""
    process: Process
    server: ServerFacts | None
    model: str
    world_size: int
    layout: dict[str, int]
    launcher: str
    device: str
    epoch: int
    up_s: float
    verdict: VerdictReport | None
    watcher_s: float | None
    """Since the watcher has looked last; None if there is none."""
    ranks: tuple[RankStatus, ...]
    """Those on this host whose journals are kept."""
    stack: tuple[str, ...] | None = None
    """Of the engine's process, as those of ranks are."""

    @property
    def num_elsewhere(self) -> int:
        """Ranks on other nodes, which only the verdict knows of; 0 where no ledger is kept."""
        return self.world_size - len(self.ranks) if self.ranks else 0


def instance_status(
    instance: Instance,
    look: Look,
    *,
    process: Process,
    now: float,
    server: ServerFacts | None = None,
    verdict: VerdictReport | None = None,
    watcher_s: float | None = None,
) -> InstanceStatus:
    """`now` is in seconds since 1970."""
    order = instance.order
    return InstanceStatus(
        pid=instance.pid,
        process=process,
        server=server,
        model=instance.model,
        world_size=instance.world_size,
        layout=instance.layout,
        launcher=instance.launcher,
        device=instance.device,
        epoch=instance.epoch,
        up_s=round(max(now - instance.started_at, 0.0), 1),
        verdict=verdict,
        watcher_s=watcher_s,
        ranks=tuple(_rank_status(one, look, verdict) for one in order.ranks) if order is not None else (),
    )


def with_stacks(
    status: InstanceStatus, of_ranks: Mapping[int, tuple[str, ...]], of_engine: tuple[str, ...]
) -> InstanceStatus:
    """The status, and where the processes are that were asked."""
    ranks = tuple(msgspec.structs.replace(one, stack=of_ranks.get(one.rank, ())) for one in status.ranks)
    return msgspec.structs.replace(status, ranks=ranks, stack=of_engine)


def _rank_status(watched: WatchedRank, look: Look, verdict: VerdictReport | None) -> RankStatus:
    one = look.ranks.get(watched.rank)
    if one is None:
        return RankStatus(rank=watched.rank, node=watched.node, process="not begun")
    entries, wait = one.entries, wait_of(look, one.rank)
    decision = one.decision(entries.step)
    is_stepping = decision is not None and not decision.is_done
    return RankStatus(
        rank=one.rank,
        node=one.node,
        process=one.process,
        is_culprit=_is_culprit(one, verdict),
        pid=entries.pid,
        phase=entries.phase,
        phase_s=_since(entries.phase_since_ns, look) if entries.phase_since_ns else None,
        step=entries.step,
        step_s=_since(decision.issued_ns, look) if decision is not None and is_stepping else None,
        groups=tuple(_group_status(one, name, look, verdict) for name in one.groups[1:]),
        waits_in=wait.what if wait is not None else None,
        waits_for=wait.others if wait is not None else (),
    )


def _group_status(one: RankLook, group: str, look: Look, verdict: VerdictReport | None) -> GroupStatus:
    sequence = one.entries.sequences[one.groups.index(group)]
    record = _newest(one, group)
    mark = _mark(one, group, look, verdict)
    if record is None or record.sequence != sequence:
        return GroupStatus(group=group, sequence=sequence, mark=mark)
    return GroupStatus(
        group=group,
        sequence=sequence,
        operation=one.text(record),
        is_in=not record.is_done,
        for_s=_since(record.done_ns or record.issued_ns, look),
        step=record.step,
        mark=mark,
    )


def _newest(one: RankLook, group: str) -> Record | None:
    index = one.groups.index(group)
    found = (record for record in reversed(one.entries.records) if record.kind == Kind.COLLECTIVE)
    return next((record for record in found if record.group == index), None)


def _mark(one: RankLook, group: str, look: Look, verdict: VerdictReport | None) -> Mark:
    is_culprit, is_awaited = _is_culprit(one, verdict), _is_awaited(one, group, look)
    if is_culprit and verdict is not None and (verdict.group == group or is_awaited):
        return "culprit"
    wait = wait_of(look, one.rank)
    if wait is not None and wait.record is not None and wait.group == group and wait.others:
        return "waits"
    return "awaited" if is_awaited else ""


def _is_culprit(one: RankLook, verdict: VerdictReport | None) -> bool:
    return verdict is not None and one.rank in verdict.culprits


def _is_awaited(one: RankLook, group: str, look: Look) -> bool:
    """Whether a member of the group is in a collective of it that this one has not come to."""
    others = (look.ranks[rank].awaits for rank in look.groups.get(group, ()) if rank in look.ranks)
    return any(at is not None and at[0] == group and not one.has_issued(group, at[1].sequence) for at in others)


def _since(then_ns: int, look: Look) -> float:
    return round(max(look.now_ns - then_ns, 0) / 1e9, 3)
