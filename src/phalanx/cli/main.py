"""`phalanx`: the entry of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from phalanx import __version__
from phalanx.cli.doctor import doctor
from phalanx.cli.failure import report
from phalanx.cli.generate import generate
from phalanx.cli.serve import serve


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


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line (without the program's name); the exit code."""
    try:
        code = phalanx.main(args=arguments, prog_name="phalanx", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return code if isinstance(code, int) else 0


def main() -> None:
    sys.exit(run())
