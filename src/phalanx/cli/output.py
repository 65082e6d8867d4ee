"""Where outputs go: standard output, or a file that keeps what it had until the first of them comes."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import click

from phalanx.cli.exit_codes import READER_GONE
from phalanx.errors import ConfigError

Write = Callable[[str], None]
"""Has handed the text to the system when it returns. Raises OSError that names where it cannot be written."""


@contextmanager
def opened(path: str | None, flag: str = "--output") -> Iterator[Write]:
    """Writes to the file, or to standard output. Raises ConfigError if that is not possible."""
    if path is None:
        if sys.stdout is None:  # so Python has a descriptor 1 that was closed before the start
            raise click.UsageError("standard output is closed: name a file with --output")
        yield _write_to_standard_output
        return
    file = OutputFile(path, flag)
    try:
        yield file.write
    finally:
        file.close()


class OutputFile:
    """A file that is emptied by the first `write`, and not before: the model may not even load."""

    def __init__(self, path: str, flag: str = "--output") -> None:
        """Raises ConfigError, of the flag that names it, if it cannot be written."""
        self._path = path
        self._has_begun = False
        try:
            self._descriptor, self._is_new = _open(path)
        except OSError as error:
            raise ConfigError(flag, path, f"it cannot be written: {error.strerror}") from error

    def write(self, text: str) -> None:
        with _naming(self._path):
            if not self._has_begun:
                self._begin()
            left = memoryview(text.encode())
            while left:
                left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        """A new file into which nothing was written does not stay."""
        with _naming(self._path):
            os.close(self._descriptor)
        if self._is_new and not self._has_begun:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    def _begin(self) -> None:
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # not a pipe or a device
            os.ftruncate(self._descriptor, 0)
        self._has_begun = True


def _open(path: str) -> tuple[int, bool]:
    """A descriptor to write to, and whether the file is new."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """The system's errors of writing do not say to what."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


def _write_to_standard_output(text: str) -> None:
    try:
        with _naming("standard output"):
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError as error:
        # At its end Python would try once more to write what is left, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who read has had enough, as `head` has
            raise click.exceptions.Exit(READER_GONE) from None
        raise
