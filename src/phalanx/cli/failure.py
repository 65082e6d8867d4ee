"""What a failed command leaves: one line on stderr, with a table under it if it needs one, and an exit code."""

from __future__ import annotations

import errno
import os
import sys

import click

from phalanx.cli.exit_codes import FAILURE, INTERRUPTED, USER_ERROR
from phalanx.cli.options import shown_name
from phalanx.errors import ConfigError, PhalanxError, RequestError, UserError

DEBUG_VARIABLE = "PHALANX_DEBUG"
TABLE_INDENT = "  "


def report(error: BaseException) -> int:
    """Say what went wrong; the exit code. With PHALANX_DEBUG=1 the traceback comes too, unless a flag is wrong."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED
    if os.environ.get(DEBUG_VARIABLE) == "1" and not isinstance(error, click.ClickException):
        sys.excepthook(type(error), error, error.__traceback__)
    message, code = _explained(error)
    text, table = _apart(message) if isinstance(error, PhalanxError) else (message, [])
    hint = f" ({DEBUG_VARIABLE}=1 shows the traceback)" if code == FAILURE else ""
    click.echo("\n".join([f"phalanx: error: {' '.join(text.split())}{hint}", *table]), err=True)
    return code


def _apart(message: str) -> tuple[str, list[str]]:
    """The message, and the lines of the table in it: they are indented by two spaces."""
    lines = message.splitlines()
    table = [line.rstrip() for line in lines if line.startswith(TABLE_INDENT)]
    return "\n".join(line for line in lines if not line.startswith(TABLE_INDENT)), table


def _explained(error: BaseException) -> tuple[str, int]:
    if isinstance(error, click.ClickException):
        return error.format_message(), USER_ERROR
    if isinstance(error, ConfigError | RequestError):
        return f"{shown_name(error.field)}: {error.value!r} is not possible: {error.allowed}", USER_ERROR
    if isinstance(error, UserError):
        return str(error), USER_ERROR
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'the output'} cannot be written: {error.strerror}", FAILURE
    kind = "" if isinstance(error, PhalanxError) else f"{type(error).__name__}: "
    return f"{kind}{error}", FAILURE
