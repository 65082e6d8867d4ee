"""A log that nobody reads holds up nobody, and says afterwards what it has lost."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from phalanx.executor.log_stream import PATIENCE_S, LogStream

LINES = 200


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    yield read, write
    for end in (read, write):
        os.close(end)


def test_what_is_taken_comes_as_it_is(pipe: tuple[int, int]) -> None:
    stream = LogStream(pipe[1])
    stream.write("a line\n")
    assert os.read(pipe[0], 100) == b"a line\n"
    stream.write("a surrogate \ud800\n")
    assert os.read(pipe[0], 100) == b"a surrogate \\ud800\n"


def test_what_nobody_reads_is_lost_and_told_of(pipe: tuple[int, int]) -> None:
    stream = LogStream(pipe[1])
    began_at = time.monotonic()
    for number in range(LINES):
        stream.write(f"line {number} {'.' * 90}\n")
    assert time.monotonic() - began_at < LINES * PATIENCE_S / 2, "it does not wait for each"
    told = os.read(pipe[0], 1 << 16)
    stream.write("and on\n")
    after = os.read(pipe[0], 1 << 16)
    num_lost = LINES - told.count(b"\n")
    assert after == b"(%d lines of the log were lost: nobody took them)\nand on\n" % num_lost
    stream.write("and on\n")
    assert os.read(pipe[0], 1 << 16) == b"and on\n"


def test_what_cannot_be_written_raises_nothing() -> None:
    with open("/dev/full", "wb") as full:
        LogStream(full.fileno()).write("a line\n")
    read, write = os.pipe()
    os.close(read)
    LogStream(write).write("nobody reads this\n")
    os.close(write)


@pytest.mark.parametrize(("place", "expected"), [("2>&1", b"engine: said\n"), ("2>&-", b""), ("2>/dev/full", b"")])
def test_a_process_logs_to_stderr_if_it_has_one(place: str, expected: bytes) -> None:
    program = (
        "import logging; from phalanx.executor.log_stream import log_to_stderr;"
        "log_to_stderr('engine: %(message)s', level=logging.INFO); logging.info('said')"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {place}', sys.executable, program], capture_output=True)
    assert (done.returncode, done.stdout) == (0, expected)
