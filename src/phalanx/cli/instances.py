"""The instances that run on this host, as `phalanx doctor` shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from phalanx.cli.checks import Check
from phalanx.cli.instance_table import instance_table
from phalanx.errors import FrameError, PeerDiedError, UserError
from phalanx.ledger.attach import SILENT_WATCHER_S, Attached
from phalanx.ledger.duration import duration
from phalanx.ledger.instance import Found, running, server_of
from phalanx.ledger.status import InstanceStatus


def instances(pid: int | None, *, with_stacks: bool) -> Iterator[Check]:
    """Each that runs, or the one that process `pid` belongs to. Raises UserError if it belongs to none."""
    found = list(running())
    if pid is not None:
        found = [one for one in found if pid in _pids_of(one)]
        if not found:
            raise UserError(
                f"process {pid} is of no instance of this user: phalanx doctor --running shows those there are"
            )
    for one in found:
        yield _look_at(one, with_stacks=with_stacks)


def _pids_of(found: Found) -> set[int]:
    """Of the engine, the server and the ranks."""
    if found.instance is None:
        return {found.pid}
    pids = {found.pid} | ({found.instance.parent_pid} if server_of(found.instance) is not None else set())
    with suppress(PeerDiedError, FrameError), Attached(found.instance) as attached:
        pids |= {rank.pid for rank in attached.status(None).ranks if rank.is_here and rank.pid is not None}
    return pids


def _look_at(found: Found, *, with_stacks: bool) -> Check:
    name = f"instance {found.pid}"
    if found.instance is None:
        return Check(name, "warn", "it is of another version", "use the phalanx doctor of that version")
    try:
        with Attached(found.instance) as attached:
            status = attached.status(attached.verdict())
            if with_stacks:
                status = attached.with_stacks(status)
    except (PeerDiedError, FrameError) as error:
        return Check(name, "warn", f"it cannot be looked at: {error}", "if it has not ended, try again")
    return check_of(status)


def check_of(status: InstanceStatus) -> Check:
    """It fails if steps do not progress."""
    name, table = f"instance {status.pid}", instance_table(status)
    if status.process != "running":
        detail = f"the engine's process (pid {status.pid}) is {status.process}"
        advice = f"kill -CONT {status.pid}, or end it" if status.process == "stopped" else None
        return Check(name, "fail", detail, advice, table, status)
    if status.verdict is not None:
        return Check(name, "fail", f"{status.verdict.cause}: {status.verdict.paragraph}", None, table, status)
    if status.watcher_s is not None and status.watcher_s > SILENT_WATCHER_S:
        detail = f"{_phases(status)}; its watcher has not looked for {duration(status.watcher_s)}"
        advice = "another one takes its place, at once if it is killed, unless the log says that none comes any more"
        return Check(name, "warn", detail, advice, table, status)
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
