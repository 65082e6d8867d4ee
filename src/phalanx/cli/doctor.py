"""`phalanx doctor`: is this machine fit to serve?"""

from __future__ import annotations

import click
import msgspec

from phalanx.cli.failure import FAILURE

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of lines.")
def doctor(model: str | None, as_json: bool) -> None:
    """Check this machine, and MODEL if it is given.

    Each line is ok, warn or fail, and says what to do. The exit code is 1 if something fails.
    """
    from phalanx.cli.checks import all_checks

    checks = []
    for check in all_checks(model):
        checks.append(check)
        if not as_json:
            click.echo(f"{click.style(f'{check.status:4}', fg=_COLORS[check.status])}  {check.name:14} {check.detail}")
            if check.advice is not None:
                click.echo(f"{'':20} → {check.advice}")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(checks)).decode())
    if any(check.status == "fail" for check in checks):
        click.get_current_context().exit(FAILURE)
