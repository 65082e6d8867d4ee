"""How an instance is at one moment: every rank, where it stands in each of its groups, and whom it waits for. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from phalanx.ledger.elsewhere import NodeSeen
from phalanx.ledger.instance import Instance, ServerFacts
from phalanx.ledger.look import Look, RankLook, Wait, wait_of
from phalanx.ledger.record import Kind, Record
from phalanx.ledger.report import VerdictReport

Process = Literal["not begun", "running", "stopped", "gone", "ended", "not heard of", "not watched"]
"""The last two are of ranks on other nodes: what is said besides is old, or nothing."""
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
    is_here: bool = True
    """Whether it is on this host. `pid` is of its own host."""
    seen_s: float | None = None
    """Of a rank that is not here: how old is what is known of it."""


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
    """Those on this host whose journals are kept, and those on other nodes that the watcher knows of."""
    stack: tuple[str, ...] | None = None
    """Of the engine's process, as those of ranks are."""

    @property
    def num_elsewhere(self) -> int:
        """Ranks on other nodes that nothing at all is known of; 0 where no ledger is kept."""
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
    elsewhere: Sequence[NodeSeen] = (),
) -> InstanceStatus:
    """`look` is at the ranks on this host, `elsewhere` what is shown of others. `now` is in seconds since 1970."""
    there = {one.rank: one for node in elsewhere for one in node.looks}
    seen = _Seen(look._replace(ranks={**look.ranks, **there}), verdict, {node.node: node for node in elsewhere})
    here = instance.order.ranks if instance.order is not None else ()
    places = [(one.rank, one.node) for one in here] + [(rank, node.node) for node in elsewhere for rank in node.ranks]
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
        ranks=tuple(_rank_status(rank, node, seen) for rank, node in sorted(places)),
    )


def with_stacks(
    status: InstanceStatus, of_ranks: Mapping[int, tuple[str, ...]], of_engine: tuple[str, ...]
) -> InstanceStatus:
    """The status, and where the processes are that were asked."""
    ranks = tuple(
        msgspec.structs.replace(one, stack=of_ranks.get(one.rank, ())) if one.is_here else one for one in status.ranks
    )
    return msgspec.structs.replace(status, ranks=ranks, stack=of_engine)


class _Seen(NamedTuple):
    """All that is known at one moment, of ranks elsewhere as of another one."""

    look: Look
    verdict: VerdictReport | None
    nodes: Mapping[str, NodeSeen]
    """The other ones."""

    def is_known_of(self, one: RankLook, at_ns: int) -> bool:
        """Whether what the rank had done at a moment is known. Who was heard of before it may have come meanwhile."""
        node = self.nodes.get(one.node)
        return node is None or at_ns < node.seen_ns

    def is_culprit(self, rank: int) -> bool:
        return self.verdict is not None and rank in self.verdict.culprits

    def missing(self, wait: Wait) -> tuple[int, ...]:
        """Whom a rank waits for, as far as one knows that they have not come."""
        return tuple(rank for rank in wait.others if self.is_known_of(self.look.ranks[rank], wait.since_ns))


def _rank_status(rank: int, node: str, seen: _Seen) -> RankStatus:
    look, seen_node = seen.look, seen.nodes.get(node)
    one, process = look.ranks.get(rank), _process_of(rank, seen, seen_node)
    seen_s = None if seen_node is None or not seen_node.seen_ns else _since(seen_node.seen_ns, look)
    status = RankStatus(
        rank=rank,
        node=node,
        process=process,
        is_culprit=seen.is_culprit(rank),
        is_here=seen_node is None,
        seen_s=seen_s,
    )
    if one is None:
        return status if process == "not begun" else msgspec.structs.replace(status, phase=process)
    entries, wait = one.entries, wait_of(look, rank)
    decision = one.decision(entries.step)
    is_stepping = decision is not None and not decision.is_done
    missing = seen.missing(wait) if wait is not None else ()
    return msgspec.structs.replace(
        status,
        pid=entries.pid,
        phase=entries.phase,
        phase_s=_since(entries.phase_since_ns, look) if entries.phase_since_ns else None,
        step=entries.step,
        step_s=_since(decision.issued_ns, look) if decision is not None and is_stepping else None,
        groups=tuple(_group_status(one, name, seen) for name in one.groups[1:]),
        waits_in=wait.what if wait is not None else None,
        waits_for=missing,
    )


def _process_of(rank: int, seen: _Seen, node: NodeSeen | None) -> Process:
    if node is not None and node.word == "unwatched":
        return "not watched"
    if rank not in seen.look.ranks:
        return "not begun"
    return "not heard of" if node is not None and node.word == "lost" else seen.look.ranks[rank].process


def _group_status(one: RankLook, group: str, seen: _Seen) -> GroupStatus:
    sequence = one.entries.sequences[one.groups.index(group)]
    record = _newest(one, group)
    mark = _mark(one, group, seen)
    if record is None or record.sequence != sequence:
        return GroupStatus(group=group, sequence=sequence, mark=mark)
    return GroupStatus(
        group=group,
        sequence=sequence,
        operation=one.text(record),
        is_in=not record.is_done,
        for_s=_since(record.done_ns or record.issued_ns, seen.look),
        step=record.step,
        mark=mark,
    )


def _newest(one: RankLook, group: str) -> Record | None:
    index = one.groups.index(group)
    found = (record for record in reversed(one.entries.records) if record.kind == Kind.COLLECTIVE)
    return next((record for record in found if record.group == index), None)


def _mark(one: RankLook, group: str, seen: _Seen) -> Mark:
    is_culprit, is_awaited = seen.is_culprit(one.rank), _is_awaited(one, group, seen)
    if is_culprit and seen.verdict is not None and (seen.verdict.group == group or is_awaited):
        return "culprit"
    wait = wait_of(seen.look, one.rank)
    if wait is not None and wait.record is not None and wait.group == group and seen.missing(wait):
        return "waits"
    return "awaited" if is_awaited else ""


def _is_awaited(one: RankLook, group: str, seen: _Seen) -> bool:
    """Whether a member of the group is in a collective of it that this one has not come to."""
    ranks = seen.look.ranks
    others = (ranks[rank].awaits for rank in seen.look.groups.get(group, ()) if rank in ranks)
    return any(
        at is not None
        and at[0] == group
        and not one.has_issued(group, at[1].sequence)
        and seen.is_known_of(one, at[1].issued_ns)
        for at in others
    )


def _since(then_ns: int, look: Look) -> float:
    return round(max(look.now_ns - then_ns, 0) / 1e9, 3)
