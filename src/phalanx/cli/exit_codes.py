"""What a command's exit code says. Imports nothing: the very first thing that is loaded needs it."""

from __future__ import annotations

FAILURE = 1
USER_ERROR = 2
FOUND = 3
"""Of `phalanx trace`: something went wrong in what was traced."""

INTERRUPTED = 130
READER_GONE = 141
"""As of a program that SIGPIPE ends."""
