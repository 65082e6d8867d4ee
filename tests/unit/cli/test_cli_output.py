"""Where outputs go: devices, links, full disks, readers that leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.cli.output import opened
from phalanx.errors import ConfigError


def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), opened("/dev/full") as write:
        write("text")


def test_a_device_and_a_link_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in ("/dev/null", str(tmp_path / "link")):
        with opened(path) as write:
            write("one\n")
            write("zwölf\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == "one\nzwölf\n".encode()


def test_a_directory_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--output: .* it cannot be written: Is a directory"), opened(str(tmp_path)):
        pass


def run_writer(arguments: str) -> subprocess.Popen[str]:
    """A command that writes lines to standard output until it cannot."""
    program = (
        "import click, sys; from phalanx.cli.output import opened\n"
        "try:\n"
        "    with opened(None) as write:\n"
        "        while True: write('line\\n')\n"
        "except click.exceptions.Exit as end: sys.exit(end.exit_code)\n"
        "except OSError as error: sys.exit(str(error))\n"
    )
    command = f'exec "$0" -c "$1" {arguments}'
    return subprocess.Popen(
        ["sh", "-c", command, sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    writer = run_writer("")
    assert writer.stdout is not None
    assert writer.stderr is not None
    assert writer.stdout.readline() == "line\n"
    writer.stdout.close()
    assert (writer.wait(60), writer.stderr.read()) == (141, "")
    writer.stderr.close()


def test_a_full_disk_behind_standard_output_is_named() -> None:
    writer = run_writer(">/dev/full")
    _, errors = writer.communicate(timeout=60)
    assert (writer.returncode, errors) == (1, "[Errno 28] No space left on device: 'standard output'\n")
