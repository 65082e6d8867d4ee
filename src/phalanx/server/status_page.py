"""The status page: ranks × groups, with who diverged, who waits and who is awaited marked. Pure, and one document.

It asks nothing of other hosts, has no script, and loads itself anew. Whatever comes from elsewhere is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from phalanx.engine.condition import Condition
from phalanx.engine.engine import Strength
from phalanx.ledger.duration import duration
from phalanx.ledger.status import GroupStatus, InstanceStatus, RankStatus
from phalanx.protocol.client import FIRST_WEIGHTS_VERSION
from phalanx.server.status import QueueStatus, ServerStatus

REFRESH_S = 2
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --bad: #c62828; --wait: #b26a00; --good: #2e7d32 }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
small { opacity: .7 }
.verdict { border-left: .4rem solid var(--bad); padding: .5rem 1rem; background: #c6282822 }
.state { color: #fff; padding: .1rem .5rem; border-radius: .3rem; background: var(--bad) }
.state.ok { background: var(--good) }
.culprit { background: #c6282833; outline: 2px solid var(--bad) }
.waits { background: #b26a0022 } .awaited { background: #b26a0044; outline: 1px dashed var(--wait) }
"""
_MARKS = {"culprit": "✗ ", "waits": "… ", "awaited": "? ", "": ""}
_TITLES = {"culprit": "to blame", "waits": "waits for others", "awaited": "others wait for it", "": ""}


def page(status: ServerStatus) -> str:
    """The whole document."""
    state = status.health.status
    parts = [
        f"<h1>Phalanx {escape(status.version)}: {escape(status.model)} "
        f'<span class="state{" ok" if state == "ok" else ""}">{escape(state)}</span></h1>',
        f"<p>Up for {duration(status.up_s)}; HTTP requests in flight: {status.num_in_flight}. "
        f"{_since_step(status)}</p>",
        _verdict(status),
        *map(_healing, status.engines),
        *map(_maintenance, status.engines),
        _queues(status.queues),
        _strength(status.strength),
        *map(_instance, status.instances),
    ]
    if not status.instances:
        parts.append("<p>Of the ranks nothing is known: no ledger is kept.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(state)}: {escape(status.model)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _strength(strength: Strength) -> str:
    """Nothing while all replicas are there, and all nodes may be used."""
    said = ""
    if strength.num_missing:
        how = "come back when there is room" if strength.grows else "do not come back by themselves"
        said += (
            f"<p>Missing: {strength.num_missing} of {strength.wanted} replicas, which {how}: "
            f"{escape(strength.missing_because or '')}</p>"
        )
    if strength.num_grown:
        said += f"<p>Replicas that have come back by themselves: {strength.num_grown}.</p>"
    if strength.drained_nodes:
        said += f"<p>Drained nodes: {escape(', '.join(strength.drained_nodes))}.</p>"
    return said


def _since_step(status: ServerStatus) -> str:
    newest = [one.since_step_s for one in status.engines if one.since_step_s is not None]
    return f"Last step {duration(min(newest))} ago." if newest else "No step was made yet."


def _verdict(status: ServerStatus) -> str:
    shown = [(one.pid, one.trouble) for one in status.engines if one.trouble is not None]
    dead = [f"<p>Engine {one.pid} has ended: {escape(one.dead)}</p>" for one in status.engines if one.dead is not None]
    down = [
        f"<p>Engine {one.pid} has ended and is being started again{escape(f' ({one.phase})' if one.phase else '')}: "
        f"{escape(one.down)}</p>"
        for one in status.engines
        if one.down is not None
    ]
    return "".join(dead + down) + "".join(
        f'<div class="verdict"><strong>{escape(trouble.cause)}</strong>, for {duration(trouble.for_s)} '
        f"(engine {pid}): {escape(trouble.paragraph)}</div>"
        for pid, trouble in shown
    )


def _healing(engine: Condition) -> str:
    """Nothing of an engine that has not had to heal, and has no standby line."""
    stats = engine.formation
    if stats is None or (not stats.num_faults and stats.standby == "none"):
        return ""
    facts = [f"Engine {engine.pid}: faults {stats.num_faults}"]
    facts += [f"healed by {rung} {count}" for rung, count in stats.healed.items()]
    facts += [f"not healed by {rung} {count}" for rung, count in stats.failed.items()]
    if stats.num_faults:
        facts.append("healing now" if stats.is_healing else f"last pause {stats.last_pause_s:.2f} s")
    if stats.standby != "none":
        facts.append(f"standby line {stats.standby}")
    return f"<p>{escape(', '.join(facts))}</p>"


def _maintenance(engine: Condition) -> str:
    """Nothing of an engine that serves, and always did so with the same weights."""
    facts = []
    if engine.weights_version != FIRST_WEIGHTS_VERSION:
        facts.append(f"weights version {engine.weights_version}")
    if engine.maintenance is not None:
        level = f" (level {engine.sleep_level})" if engine.sleep_level else ""
        facts.append(f"{engine.maintenance.phase}{level}")
    return f"<p>{escape(f'Engine {engine.pid}: ' + ', '.join(facts))}</p>" if facts else ""


def _queues(queues: Sequence[QueueStatus]) -> str:
    rows = (
        (
            *(one.replica, one.state, one.num_running, one.num_waiting, f"{one.num_blocks_used} of {one.num_blocks}"),
            *(one.num_steps, one.num_generated_tokens, one.num_preemptions),
        )
        for one in queues
    )
    titles = ("replica", "state", "running", "waiting", "KV blocks", "steps", "tokens made", "preemptions")
    body = "".join(_numbers(map(str, row)) for row in rows)
    return f"<h2>Queues</h2><table><tr>{_titles(titles)}</tr>{body}</table>"


def _instance(instance: InstanceStatus) -> str:
    sizes = ", ".join(
        f"{name.removesuffix('_size').replace('_', ' ')} {size}" for name, size in instance.layout.items()
    )
    facts = [f"process {instance.pid} ({instance.process})", f"{instance.world_size} ranks", sizes, instance.device]
    facts += [f"launcher {instance.launcher}", f"epoch {instance.epoch}"]
    if instance.watcher_s is not None:
        facts.append(f"watcher looked {duration(instance.watcher_s)} ago")
    title = f"<h2>Engine</h2><p>{escape(', '.join(facts))}</p>"
    if not instance.ranks:
        return f"{title}<p>No ledger of its ranks is kept on this host.</p>"
    groups = sorted({group.group for rank in instance.ranks for group in rank.groups})
    if instance.num_elsewhere:
        title += f"<p>Ranks on other nodes, of which nothing is known here: {instance.num_elsewhere}</p>"
    titles = _titles(("rank", "node", "process", "phase", "step", "waits for", *groups))
    return f"{title}<table><tr>{titles}</tr>{''.join(_rank(rank, groups) for rank in instance.ranks)}</table>"


def _rank(rank: RankStatus, groups: Sequence[str]) -> str:
    of = {group.group: group for group in rank.groups}
    step = f"{rank.step}" + (f" <small>{duration(rank.step_s)}</small>" if rank.step_s is not None else "")
    phase = escape(rank.phase) + (f" <small>{duration(rank.phase_s)}</small>" if rank.phase_s is not None else "")
    process = escape(rank.process) + (f" <small>pid {rank.pid}</small>" if rank.pid is not None else "")
    name = f"{_MARKS['culprit' if rank.is_culprit else '']}{rank.rank}"
    cells = (name, escape(rank.node), process, phase, step, ", ".join(map(str, rank.waits_for)))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}{''.join(_group(of.get(name)) for name in groups)}</tr>"


def _group(group: GroupStatus | None) -> str:
    if group is None:
        return "<td></td>"
    told = f"#{group.sequence}" + (f" {escape(group.operation)}" if group.operation is not None else "")
    if group.for_s is not None:
        told += f"<br><small>{'in it for' if group.is_in else 'done'} {duration(group.for_s)}"
        told += "</small>" if group.is_in else " ago</small>"
    mark = group.mark
    return f'<td class="{mark}" title="{_TITLES[mark]}">{_MARKS[mark]}{told if group.sequence else ""}</td>'


def _titles(titles: Iterable[str]) -> str:
    return "".join(f"<th>{escape(title)}</th>" for title in titles)


def _numbers(cells: Iterable[str]) -> str:
    row = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
    return f"<tr>{row}</tr>"
