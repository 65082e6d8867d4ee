"""The instances that run on this host, as `phalanx doctor` shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phalanx.cli.checks import Check
from phalanx.cli.instance_table import instance_table
from phalanx.errors import FrameError, PeerDiedError, UserError
from phalanx.ledger.attach import Attached
from phalanx.ledger.instance import Found, running
from phalanx.ledger.status import InstanceStatus


def instances(pid: int | None, *, with_stacks: bool) -> Iterator[Check]:
    """Each that runs, or the one that process `pid` belongs to. Raises UserError if it belongs to none."""
    found = list(running())
    seen = False
    for one in found:
        check, pids = _look_at(one, with_stacks=with_stacks and pid is None)
        if pid is None:
            yield check
        elif pid in pids:
            seen = True
            yield _look_at(one, with_stacks=with_stacks)[0] if with_stacks else check
    if pid is not None and not seen:
        others = f"; there are {', '.join(str(one.pid) for one in found)}" if found else "; none is running"
        raise UserError(f"process {pid} is of no instance of this user{others}")


def _look_at(found: Found, *, with_stacks: bool) -> tuple[Check, set[int]]:
    """How it is, and its processes."""
    name = f"instance {found.pid}"
    if found.instance is None:
        return Check(name, "warn", "it is of another version", "use the phalanx doctor of that version"), {found.pid}
    try:
        with Attached(found.instance) as attached:
            status = attached.status(attached.judge() or attached.standing())
            if with_stacks:
                status = attached.with_stacks(status)
    except (PeerDiedError, FrameError) as error:
        return Check(name, "warn", f"it has just ended: {error}", "run phalanx doctor again"), {found.pid}
    pids = {status.pid, found.instance.parent_pid, *(rank.pid for rank in status.ranks if rank.pid is not None)}
    return check_of(status), pids


def check_of(status: InstanceStatus) -> Check:
    """It fails if steps do not progress."""
    name, table = f"instance {status.pid}", instance_table(status)
    if status.process != "running":
        detail = f"the engine's process (pid {status.pid}) is {status.process}"
        advice = f"kill -CONT {status.pid}, or end it" if status.process == "stopped" else None
        return Check(name, "fail", detail, advice, table, status)
    if status.verdict is not None:
        return Check(name, "fail", f"{status.verdict.cause}: {status.verdict.paragraph}", None, table, status)
    return Check(name, "ok", _phases(status), None, table, status)


def _phases(status: InstanceStatus) -> str:
    """What its ranks do, in words."""
    if not status.ranks:
        return "no ledger of its ranks is kept on this host"
    phases: dict[str, list[int]] = {}
    for rank in status.ranks:
        phases.setdefault(rank.phase, []).append(rank.rank)
    return "; ".join(f"{_ranks(ranks)} {phase}" for phase, ranks in phases.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}:"
