"""`phalanx doctor`: is this machine fit to serve?"""

from __future__ import annotations

import itertools
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
def doctor(model: str | None, as_json: bool, **settings: Any) -> None:
    """Check this machine, and MODEL if it is given.

    Each line is ok, warn or fail, and says what to do. The exit code is 1 if something fails. With the flags of
    `phalanx serve` it says whether the port is free and there is room for the ranks, and with --launcher ray where each
    of them would be.
    """
    from phalanx.cli.checks import all_checks, without_effect
    from phalanx.cli.placement import placement

    server = convert(given(settings, ServerConfig), ServerConfig)
    engine_settings = {name: value for name, value in settings.items() if name not in ServerConfig.__struct_fields__}
    config = Config.build(model=model or UNKNOWN, **given(engine_settings))
    checks = []
    unread = [flag(name) for name in _READ_BY_SERVE_ALONE if name in given(settings)]
    for check in itertools.chain(
        without_effect(unread), all_checks(model, server), placement(config, config.model.model)
    ):
        checks.append(check)
        if not as_json:
            _print(check)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(checks)).decode())
    if any(check.status == "fail" for check in checks):
        click.get_current_context().exit(FAILURE)


def _print(check: Check) -> None:
    click.echo(f"{click.style(f'{check.status:4}', fg=_COLORS[check.status])}  {check.name:14} {check.detail}")
    if check.advice is not None:
        click.echo(f"{'':20} → {check.advice}")
    if check.table is not msgspec.UNSET:
        click.echo(f"\n{check.table}\n")
