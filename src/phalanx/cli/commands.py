"""The group of all commands."""

from __future__ import annotations

import click

from phalanx.cli.chaos import chaos
from phalanx.cli.doctor import doctor
from phalanx.cli.generate import generate
from phalanx.cli.maintenance import reload, sleep, wake
from phalanx.cli.scale import drain, scale
from phalanx.cli.serve import serve
from phalanx.cli.trace import trace
from phalanx.cli.upcycle import upcycle
from phalanx.cli.watch import watch
from phalanx.version import __version__


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="phalanx %(version)s")
@click.pass_context
def phalanx(ctx: click.Context) -> None:
    """Serve a large language model over many processes."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


phalanx.add_command(serve)
phalanx.add_command(generate)
phalanx.add_command(doctor)
phalanx.add_command(trace)
phalanx.add_command(upcycle)
phalanx.add_command(chaos)
phalanx.add_command(watch)
phalanx.add_command(scale)
phalanx.add_command(drain)
phalanx.add_command(reload)
phalanx.add_command(sleep)
phalanx.add_command(wake)
