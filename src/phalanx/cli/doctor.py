"""`phalanx doctor`: is this machine fit to serve, and how is what runs on it?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click
import msgspec

from phalanx.cli.exit_codes import FAILURE
from phalanx.cli.options import SectionedCommand, engine_options, flag, given, server_options
from phalanx.config import Config, ServerConfig, convert

if TYPE_CHECKING:
    from phalanx.cli.checks import Check

UNKNOWN = "no model"

_READ_BY_SERVE_ALONE = ("shutdown_timeout_s", "served_model_name")

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(cls=SectionedCommand, params=[*server_options(), *engine_options()])
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of lines.")
@click.option("--running", is_flag=True, help="Look at the running instances of this user and at nothing else.")
@click.option("--pid", type=click.IntRange(min=1), help="Look at one instance only: any of its processes' ids.")
@click.option("--stacks", is_flag=True, help="Say of each process of the instances where in Python it is.")
def doctor(model: str | None, as_json: bool, running: bool, pid: int | None, stacks: bool, **settings: Any) -> None:
    """Check this machine, and MODEL if it is given; without MODEL and settings also the instances that run on it.

    Each line is ok, warn or fail, and says what to do. The exit code is 1 if something fails. With the flags of
    `phalanx serve` it says whether the port is free and there is room for the ranks, and with --launcher ray where each
    of them would be. Of an instance it shows each rank, also when it hangs: what it does, and for whom it waits.
    """
    from phalanx.cli.instances import instances

    is_given = model is not None or bool(given(settings))
    if is_given and (running or pid is not None or stacks):
        raise click.UsageError("--running, --pid and --stacks are for what runs: leave out MODEL and its settings")
    checks: list[Iterable[Check]] = []
    if not running and pid is None:
        checks.append(_machine(model, settings))
    if not is_given:
        checks.append(instances(pid, with_stacks=stacks))
    _show(itertools.chain.from_iterable(checks), as_json)


def _machine(model: str | None, settings: Mapping[str, Any]) -> Iterator[Check]:
    from phalanx.cli.checks import all_checks, without_effect
    from phalanx.cli.placement import placement

    server = convert(given(settings, ServerConfig), ServerConfig)
    engine_settings = {name: value for name, value in settings.items() if name not in ServerConfig.__struct_fields__}
    config = Config.build(model=model or UNKNOWN, **given(engine_settings))
    unread = [flag(name) for name in _READ_BY_SERVE_ALONE if name in given(settings)]
    yield from without_effect(unread)
    yield from all_checks(model, server)
    yield from placement(config)


def _show(checks: Iterable[Check], as_json: bool) -> None:
    """Print each as it comes, or all as JSON. Exits with a failure if one has failed."""
    shown = []
    for check in checks:
        shown.append(check)
        if not as_json:
            _print(check)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(shown)).decode())
    elif not shown:
        click.echo("no instance of this user runs")
    if any(check.status == "fail" for check in shown):
        click.get_current_context().exit(FAILURE)


def _print(check: Check) -> None:
    click.echo(f"{click.style(f'{check.status:4}', fg=_COLORS[check.status])}  {check.name:14} {check.detail}")
    if check.advice is not None:
        click.echo(f"{'':20} → {check.advice}")
    if check.table is not msgspec.UNSET:
        click.echo(f"\n{check.table}\n")
