"""`phalanx`: the entry of the command line. It is there before what takes time to import, to answer Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from phalanx.cli.exit_codes import INTERRUPTED


def run(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command line (without the program's name); the exit code."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    from phalanx.cli.commands import phalanx
    from phalanx.cli.failure import report

    try:
        code = phalanx.main(args=arguments, prog_name="phalanx", standalone_mode=False)
    except Exception as error:  # whatever it is, it ends here, with a line and an exit code
        return report(error)
    return code if isinstance(code, int) else 0


def main() -> None:
    sys.exit(run())
