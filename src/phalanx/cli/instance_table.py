"""An instance as lines and a table, for a terminal. Pure: text of a given width, without colours."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from phalanx.ledger.duration import duration
from phalanx.ledger.status import GroupStatus, InstanceStatus, RankStatus

INDENT = 2
WIDTH = 160
_MARKS = {"culprit": "✗", "waits": "…", "awaited": "?", "": " "}
LEGEND = "✗ to blame, … waits for others, ? others wait for it"


def instance_table(status: InstanceStatus, width: int = WIDTH) -> str:
    """Indented lines: what it is, each rank, each rank's newest collective in each of its groups, and stacks."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    for line in _facts(status):
        console.print(line, soft_wrap=True)
    if status.ranks:
        console.print()
        console.print(_ranks(status.ranks))
    if status.num_elsewhere:
        elsewhere = f"ranks on other nodes, of which nothing is known here: {status.num_elsewhere}"
        console.print(elsewhere, soft_wrap=True)
    if any(rank.groups for rank in status.ranks):
        console.print()
        console.print(_collectives(status.ranks))
        console.print(LEGEND, soft_wrap=True)
    for line in _stacks(status):
        console.print(line, soft_wrap=True)
    return "\n".join(f"{'':{INDENT}}{line}".rstrip() for line in sink.getvalue().splitlines())


def _facts(status: InstanceStatus) -> Iterator[str]:
    server = f", at {status.server.url}" if status.server is not None else ""
    yield f"{status.model}{server}"
    sizes = [f"{name.removesuffix('_size').replace('_', ' ')} {size}" for name, size in status.layout.items()]
    ranks = "1 rank" if status.world_size == 1 else f"{status.world_size} ranks"
    yield ", ".join((ranks, *sizes, status.device, f"launcher {status.launcher}", f"epoch {status.epoch}"))
    watcher = "" if status.watcher_s is None else f", its watcher looked {duration(status.watcher_s)} ago"
    yield f"engine's process {status.pid}, {status.process}, up for {duration(status.up_s)}{watcher}"


def _ranks(ranks: Sequence[RankStatus]) -> Table:
    table = _table("", "rank", "node", "pid", "process", "phase", "for", "step", "for", "waits for")
    for one in ranks:
        table.add_row(
            _MARKS["culprit" if one.is_culprit else ""],
            str(one.rank),
            one.node,
            "" if one.pid is None else str(one.pid),
            one.process,
            one.phase,
            _or_nothing(one.phase_s),
            str(one.step) if one.step else "",
            _or_nothing(one.step_s),
            ", ".join(f"rank {rank}" for rank in one.waits_for),
        )
    return table


def _collectives(ranks: Sequence[RankStatus]) -> Table:
    table = _table("", "rank", "group", "sequence", "newest collective", "", "for")
    for one in ranks:
        for group in one.groups:
            table.add_row(
                _MARKS[group.mark],
                str(one.rank),
                group.group,
                str(group.sequence) if group.sequence else "",
                group.operation or "",
                _is_in(group),
                _or_nothing(group.for_s),
            )
    return table


def _is_in(group: GroupStatus) -> str:
    return "" if group.for_s is None else "in it" if group.is_in else "done"


def _stacks(status: InstanceStatus) -> Iterator[str]:
    if status.stack is not None and not all(rank.is_here for rank in status.ranks):
        yield ""
        yield "where ranks on other nodes are is told with a verdict"
    ranks = ((f"rank {rank.rank}", rank.process, rank.stack) for rank in status.ranks)
    for name, process, stack in (("the engine", status.process, status.stack), *ranks):
        if stack is None:
            continue
        yield ""
        yield f"{name} is at" if stack else f"{name} ({process}) does not say where it is"
        yield from (f"  {line}" for line in stack)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for title in titles:
        is_number = title in ("rank", "pid", "for", "step", "sequence")
        table.add_column(title, justify="right" if is_number else "left", overflow="fold")
    return table


def _or_nothing(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)
