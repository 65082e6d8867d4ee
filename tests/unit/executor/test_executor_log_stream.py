"""A log that nobody reads holds up nobody, and says afterwards what it has lost."""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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


def test_a_terminal_that_nobody_reads_holds_up_nothing() -> None:
    """It takes some of a line, and then a write to it waits for ever."""
    master, terminal = os.openpty()
    stream = LogStream(terminal)
    writing = threading.Thread(target=lambda: [stream.write("." * 150 + "\n") for _ in range(LINES)], daemon=True)
    writing.start()
    writing.join(LINES * PATIENCE_S)
    assert not writing.is_alive()
    while select.select([master], [], [], 0)[0]:
        os.read(master, 1 << 16)
    stream.write("and on\n")
    lost, last = os.read(master, 1 << 16).split(b"\r\n")[-3:-1]
    assert b"lines of the log were lost" in lost and last == b"and on"
    assert os.get_blocking(terminal), "it is that of others, too"
    for end in (master, terminal):
        os.close(end)


def test_a_line_that_was_taken_in_part_ends_there(pipe: tuple[int, int]) -> None:
    stream = LogStream(pipe[1])
    stream.write("." * 5000 + "\n")
    assert os.read(pipe[0], 1 << 16) == b"." * 4096
    stream.write("and on\n")
    assert os.read(pipe[0], 1 << 16) == b"\n(1 lines of the log were lost: nobody took them)\nand on\n"


def test_a_file_is_written_where_others_have_left_off(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb", buffering=0) as file:
        file.write(b"before\n")
        LogStream(file.fileno()).write("a line\n")
        file.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\na line\nafter\n"


def test_what_cannot_be_written_raises_nothing() -> None:
    with open("/dev/full", "wb") as full:
        LogStream(full.fileno()).write("a line\n")
    read, write = os.pipe()
    os.close(read)
    LogStream(write).write("nobody reads this\n")
    os.close(write)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("pass", "WARNING rank 1: careful\nWARNING rank 1: beware\n"),
        (
            "logging.basicConfig(level=logging.INFO, format='MINE %(message)s')",
            "MINE hello\nMINE careful\nWARNING rank 1: beware\n",
        ),
        (
            "own.addHandler(logging.StreamHandler()); own.setLevel(logging.INFO)",
            "hello\ncareful\nWARNING rank 1: beware\n",
        ),
        ("logging.warning('at once')", "WARNING:root:at once\nWARNING:own:careful\nWARNING rank 1: beware\n"),
        ("own.setLevel(logging.INFO)", "WARNING rank 1: careful\nWARNING rank 1: beware\n"),
    ],
    ids=["nothing", "all", "a handler", "by itself", "a level"],
)
def test_a_users_logging_is_its_own(own: str, expected: str) -> None:
    program = (
        "import logging; from phalanx.executor.log_stream import log_to_stderr_beside;"
        "log_to_stderr_beside('%(levelname)s rank 1: %(message)s', level=logging.WARNING);"
        f"own = logging.getLogger('own'); {own}; own.info('hello'); own.warning('careful');"
        "ours = logging.getLogger('phalanx.worker'); ours.info('for rank 0 to say'); ours.warning('beware')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, expected)


def test_of_rank_0_more_is_told() -> None:
    program = (
        "import logging; from phalanx.executor.log_stream import log_to_stderr_beside;"
        "log_to_stderr_beside('%(levelname)s rank 0: %(message)s', level=logging.INFO);"
        "logging.getLogger('own').info('hello'); logging.getLogger('phalanx.worker').info('for all')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "INFO rank 0: hello\nINFO rank 0: for all\n")


@pytest.mark.parametrize(("place", "expected"), [("2>&1", b"engine: said\n"), ("2>&-", b""), ("2>/dev/full", b"")])
def test_a_process_logs_to_stderr_if_it_has_one(place: str, expected: bytes) -> None:
    program = (
        "import logging; from phalanx.executor.log_stream import log_to_stderr;"
        "log_to_stderr('engine: %(message)s', level=logging.INFO); logging.info('said')"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {place}', sys.executable, program], capture_output=True)
    assert (done.returncode, done.stdout) == (0, expected)
