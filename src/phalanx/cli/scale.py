"""`phalanx scale` and `phalanx drain`: another size while requests stream on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from msgspec import UNSET

from phalanx.cli.options import given_of
from phalanx.cli.running_server import RunningServer
from phalanx.cli.setting_types import SecondsRange
from phalanx.errors import PhalanxError, ResizeError, UserError

if TYPE_CHECKING:
    from phalanx.engine.engine import Strength
    from phalanx.server.scaling import DrainRequest, ResizeReport, ScaleReport, ScaleRequest

POLL_S = 0.2

_DRAIN_TIMEOUT = click.option(
    "--drain-timeout",
    type=SecondsRange(min=0.0, max=1e6),
    default=30.0,
    show_default=True,
    help="Seconds that requests of a replica that leaves may still take there, before others take them over.",
)
_WAIT = click.option("--wait/--no-wait", default=True, show_default=True, help="Return when it is done.")


@click.command()
@click.argument("url")
@click.argument("size", required=False, type=click.IntRange(min=1))
@click.option(
    "--leaving", type=click.IntRange(min=0), multiple=True, help="A replica that is to leave. May be repeated."
)
@click.option(
    "--tensor-parallel-size",
    "-tp",
    type=click.IntRange(min=1),
    help="Ranks that are to share every layer: of a single replica, or of all that share experts.",
)
@_DRAIN_TIMEOUT
@_WAIT
def scale(
    url: str,
    size: int | None,
    leaving: tuple[int, ...],
    tensor_parallel_size: int | None,
    drain_timeout: float,
    wait: bool,
) -> None:
    """Have the server at URL serve with SIZE replicas; without SIZE, say how many there are.

    Requests stream on meanwhile. If it fails, or Ctrl-C ends it, all is as before.
    """
    from phalanx.server.scaling import ScaleReport, ScaleRequest

    server = RunningServer(url)
    if size is None and tensor_parallel_size is None:
        if without := given_of("leaving", "drain_timeout", "wait"):
            raise click.UsageError(f"{', '.join(without)}: without effect if nothing is to change: give SIZE")
        _print_replicas(server.call("GET", "/scale", ScaleReport))
        return
    if size is None and leaving:
        raise click.UsageError("--leaving is for fewer replicas: give SIZE")
    asked = ScaleRequest(
        data_parallel_size=UNSET if size is None else size,
        tensor_parallel_size=UNSET if tensor_parallel_size is None else tensor_parallel_size,
        leaving=list(leaving),
        drain_timeout_s=drain_timeout,
    )
    _see_through(server, _begin(server, "/scale", asked), wait)


@click.command()
@click.argument("url")
@click.argument("what", metavar="REPLICA|NODE")
@click.option("--undo", is_flag=True, help="Of a node: let ranks come there again.")
@_DRAIN_TIMEOUT
@_WAIT
def drain(url: str, what: str, undo: bool, drain_timeout: float, wait: bool) -> None:
    """Have a replica of the server at URL leave, by its number: it gets no new requests, and the others take over what
    it has.

    With the name or address of a node of its Ray cluster: every replica with a rank there leaves, after others have
    started on other nodes, as far as there is room. No rank comes there again, until --undo.

    `phalanx scale URL` lists the replicas.
    """
    from phalanx.server.scaling import DrainRequest, ScaleReport

    server = RunningServer(url)
    replica = int(what) if what.isdecimal() else UNSET
    if undo and replica is not UNSET:
        raise click.UsageError(f"--undo is for a node: phalanx scale {url} SIZE brings a replica back")
    asked = DrainRequest(
        replica=replica, node=UNSET if what.isdecimal() else what, undo=undo or UNSET, drain_timeout_s=drain_timeout
    )
    if undo:
        _tell_strength(server.call("POST", "/drain", ScaleReport, asked).strength)
        return
    _see_through(server, _begin(server, "/drain", asked), wait)


def _begin(server: RunningServer, path: str, asked: ScaleRequest | DrainRequest) -> ScaleReport:
    """Ask for a resize. Ctrl-C before the answer undoes it if it has begun by then, and says if that is not known."""
    from phalanx.server.scaling import ScaleReport

    asked_at = time.monotonic()
    try:
        return server.call("POST", path, ScaleReport, asked)
    except KeyboardInterrupt:
        try:
            found = server.call("GET", "/scale", ScaleReport)
            begun = found.resize
            if begun is not None and begun.state == "running" and begun.took_s <= time.monotonic() - asked_at:
                _cancel(server, begun.id, _Screen())
            else:
                click.echo(f"it has not begun; whether it still does says phalanx scale {server.url}", err=True)
        except PhalanxError as error:
            click.echo(f"{error}; whether it has begun says phalanx scale {server.url}", err=True)
        raise


def _see_through(server: RunningServer, begun: ScaleReport, wait: bool) -> None:
    if not wait:
        return
    assert begun.resize is not None
    screen = _Screen()
    try:
        found = _follow(server, begun, begun.resize.id, screen)
    except KeyboardInterrupt:
        _cancel(server, begun.resize.id, screen)
        raise
    screen.show(found)
    _tell_end(_resize_of(found, begun.resize.id))
    _tell_strength(found.strength)


def _follow(server: RunningServer, found: ScaleReport, resize: int, screen: _Screen) -> ScaleReport:
    while _resize_of(found, resize).state == "running":
        screen.show(found)
        time.sleep(POLL_S)
        found = server.call("GET", "/scale", type(found))
    return found


def _cancel(server: RunningServer, resize: int, screen: _Screen) -> None:
    from phalanx.server.scaling import ScaleReport

    click.echo("undoing it", err=True)
    found = _follow(server, server.call("DELETE", "/scale", ScaleReport), resize, screen)
    click.echo(f"the resize: {_resize_of(found, resize).state}", err=True)


def _resize_of(found: ScaleReport, resize: int) -> ResizeReport:
    if found.resize is None or found.resize.id != resize:
        raise UserError("the server was started anew, or somebody else resizes it: phalanx scale URL says how it is")
    return found.resize


def _tell_end(resize: ResizeReport) -> None:
    if resize.state == "cancelled":
        raise ResizeError("the resize was cancelled: all is as before")
    if resize.state == "failed":
        raise ResizeError(f"the resize has failed, and all is as before: {resize.error}")
    told = f"replicas: {resize.data_parallel_size}, before: {resize.size_before}"
    if resize.tensor_parallel_size != resize.tensor_parallel_size_before:
        told += f"; TP size: {resize.tensor_parallel_size}, before: {resize.tensor_parallel_size_before}"
    click.echo(f"{told}; it took {resize.took_s:.1f} s")


class _Screen:
    """Says on stderr what each replica does, when that changes."""

    def __init__(self) -> None:
        self._shown: dict[int, str] = {}

    def show(self, found: ScaleReport) -> None:
        now = {one.replica: f"{one.state}{f', {one.phase}' if one.phase else ''}" for one in found.replicas}
        for replica in sorted({*self._shown, *now}):
            text = now.get(replica, "gone")
            if self._shown.get(replica) != text:
                click.echo(f"replica {replica}: {text}", err=True)
        self._shown = now


def _print_replicas(found: ScaleReport) -> None:
    for one in found.replicas:
        click.echo(f"replica {one.replica}: {one.state}, requests: {one.num_requests}")
    _tell_strength(found.strength)


def _tell_strength(strength: Strength) -> None:
    """What there is to say of replicas that are missing, and of nodes that are drained."""
    if strength.num_missing:
        until = "until there is room again" if strength.grows else "until they are asked for again (phalanx scale)"
        click.echo(
            f"missing: {strength.num_missing} of {strength.wanted} replicas, {until}: {strength.missing_because}"
        )
    if strength.drained_nodes:
        click.echo(f"drained: {', '.join(strength.drained_nodes)}")
