"""What a process has, and what it has more than before."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from phalanx.errors import UserError
from phalanx.testing.holdings import Holdings, children_of, parent_of, used_of_gpus

NOTHING = Holdings(0, 0, 0, 0, 0, 0)


def test_more_is_told_and_less_is_not() -> None:
    before = Holdings(num_processes=5, num_descriptors=40, num_segments=7, num_files=0, num_ports=2, rss_bytes=1 << 30)
    assert before.beyond(before, num_ranks=2) == [] and NOTHING.beyond(before, num_ranks=2) == []
    more = Holdings(6, 40 + 9, 7 + 10, 1, 3, (1 << 30) + (65 << 20), gpu_bytes=257 << 20)
    assert [one.partition(",")[0] for one in more.beyond(before, num_ranks=2)] == [
        *("6 processes", "17 segments of memory", "1 files in /dev/shm", "3 ports", "1141899264 bytes of memory"),
        "269484032 bytes of GPUs",
    ]
    assert "17 segments of memory, 7 before" not in more.beyond(before, num_ranks=3), "of lines that have ended"


def test_what_a_process_has() -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "sleep 100 & echo; wait"], process_group=0, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        assert Holdings.of(process.pid).num_processes == 2
        (sleep,) = children_of(process.pid)
        assert parent_of(sleep) == process.pid
        before = Holdings.of(os.getpid())
        memory = os.memfd_create("phalanx:test")
        assert Holdings.of(os.getpid()).num_segments == before.num_segments + 1
        os.close(memory)
        ports = Holdings.of(os.getpid()).num_ports
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            assert Holdings.of(os.getpid()).num_ports == ports + 1, "who has connected listens to nobody"
        assert Holdings.of(os.getpid()).num_ports == ports
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()
    expires_at = time.monotonic() + 10.0
    while Holdings.of(process.pid)[:3] != (0, 0, 0):  # the second one has another parent by now, which sees to its end
        assert time.monotonic() < expires_at
        time.sleep(0.01)
    assert children_of(process.pid) == [] and parent_of(process.pid) is None


@pytest.mark.parametrize(
    ("told", "expected"), [("echo 100; echo 3", 103 << 20), ("echo '[N/A]'", None), ("echo broken >&2; exit 9", None)]
)
def test_what_gpus_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, expected: int | None) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ntest $4 = 4,7 || exit 1\n{told}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    if expected is not None:
        assert used_of_gpus() == expected
    else:
        with pytest.raises(UserError, match="cannot be told"):
            used_of_gpus()


def test_without_the_drivers_tools_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nvidia-smi, of the driver's tools"):
        used_of_gpus()
