"""`phalanx watch`: says which rank of a program is to blame when the others wait for it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import click
from msgspec import Meta

from phalanx.cli.setting_types import type_for
from phalanx.errors import ConfigError

PATIENCE_S = 10.0


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--patience",
    type=type_for("--patience", Annotated[float, Meta(gt=0)]),
    help=f"Seconds that ranks may wait for one that computes before that is told. [default: {PATIENCE_S:g}]",
)
@click.option(
    "--events", type=type_for("--events", str), help="File to which verdicts are appended, a line of JSON each."
)
@click.option("--kill", is_flag=True, help="End COMMAND when its ranks can never meet again.")
def watch(command: tuple[str, ...], patience: float | None, events: str | None, kill: bool) -> None:
    """Run COMMAND, and say which rank is to blame when the others wait.

    COMMAND starts a program with torch.distributed on this host, such as torchrun; its Python processes find out by
    themselves that they are watched. Verdicts go to stderr. The exit code is COMMAND's.

    \b
        phalanx watch -- torchrun --nproc-per-node 4 train.py
    """
    from phalanx.cli.watched_command import run_watched
    from phalanx.ledger.events import EventLines

    with ExitStack() as resources:
        lines = None
        if events is not None:
            try:
                lines = resources.enter_context(EventLines(events))
            except OSError as error:
                raise ConfigError("--events", events, f"it cannot be written: {error.strerror}") from error
        code = run_watched(command, patience_s=patience or PATIENCE_S, events=lines, kill=kill)
    click.get_current_context().exit(code)
