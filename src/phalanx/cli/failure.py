"""What a failed command leaves: one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys

import click

from phalanx.cli.options import shown_name
from phalanx.errors import ConfigError, PhalanxError, RequestError, UserError

USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130

DEBUG_VARIABLE = "PHALANX_DEBUG"


def report(error: BaseException) -> int:
    """Say what went wrong; the exit code. With PHALANX_DEBUG=1 the traceback comes too, unless a flag is wrong."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    if os.environ.get(DEBUG_VARIABLE) == "1" and not isinstance(error, click.ClickException):
        sys.excepthook(type(error), error, error.__traceback__)
    message, code = _explained(error)
    click.echo(f"phalanx: error: {' '.join(message.split())}", err=True)
    return code


def _explained(error: BaseException) -> tuple[str, int]:
    if isinstance(error, click.ClickException):
        return error.format_message(), USER_ERROR
    if isinstance(error, ConfigError | RequestError):
        return f"{shown_name(error.field)}: {error.value!r} is not possible: {error.allowed}", USER_ERROR
    if isinstance(error, UserError):
        return str(error), USER_ERROR
    kind = "" if isinstance(error, PhalanxError) else f"{type(error).__name__}: "
    return f"{kind}{error} ({DEBUG_VARIABLE}=1 shows the traceback)", FAILURE
