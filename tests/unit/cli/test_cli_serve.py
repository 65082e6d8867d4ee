"""`phalanx serve`: what it says when it is ready, and how it shows the start."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from phalanx.cli.progress import StartScreen
from phalanx.cli.serve import announcement
from phalanx.protocol.client import EngineReady, StartProgress
from phalanx.server.run import Served

READY = EngineReady(max_model_len=2048, num_blocks=100, block_size=16, world_size=2, device="cpu", dtype="bfloat16")


def command_in(text: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.strip().startswith("curl"))
    return shlex.split(line)


def test_the_command_can_be_pasted() -> None:
    text = announcement(Served(READY, "it's tiny", "http://[::1]:8000", needs_key=False, can_chat=True))
    command = command_in(text)
    assert command[1] == "http://[::1]:8000/v1/chat/completions"
    body = json.loads(command[command.index("-d") + 1])
    assert body["model"] == "it's tiny"
    assert body["messages"][0]["role"] == "user"
    assert "Authorization" not in text
    assert "bfloat16 on cpu, 2 ranks, 2048 tokens of context, 1600 tokens of KV cache" in text


def test_a_model_without_a_template_and_a_server_with_keys() -> None:
    text = announcement(Served(READY, "base", "http://127.0.0.1:1", needs_key=True, can_chat=False))
    command = command_in(text)
    assert command[1] == "http://127.0.0.1:1/v1/completions"
    assert "prompt" in json.loads(command[command.index("-d") + 1])
    assert "Authorization: Bearer YOUR_KEY" in command


def notes() -> list[StartProgress]:
    return [
        StartProgress(0, "starting", 0, 0),
        StartProgress(1, "starting", 0, 0),
        StartProgress(0, "loading weights", 10, 100),
        StartProgress(0, "loading weights", 90, 100),
    ]


def test_elsewhere_than_on_a_terminal_a_phase_is_a_line() -> None:
    written = io.StringIO()
    with StartScreen(Console(file=written)) as screen:
        for note in notes():
            screen.note(note)
    assert written.getvalue() == "rank 0: starting\nrank 1: starting\nrank 0: loading weights\n"


def test_the_node_of_a_rank_is_said_once_and_kept_in_the_table() -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    for written, is_terminal in ((plain, False), (terminal, True)):
        with StartScreen(Console(file=written, force_terminal=is_terminal, width=100)) as screen:
            screen.note(StartProgress(3, "starting", node="host-b"))
            screen.note(StartProgress(3, "joining"))
            if is_terminal:
                written.truncate(0)
                screen._live.refresh()
    assert plain.getvalue() == "rank 3: starting on host-b\nrank 3: joining\n"
    assert all(word in terminal.getvalue() for word in ("node", "host-b", "joining"))
    assert "starting" not in terminal.getvalue()


def test_on_a_terminal_the_lines_change_and_go_away() -> None:
    written = io.StringIO()
    with StartScreen(Console(file=written, force_terminal=True, width=100)) as screen:
        for note in notes():
            screen.note(note)
        screen._live.refresh()
        assert "starting" in written.getvalue()
        assert "90 bytes of 100 bytes" in written.getvalue()
        screen.note(StartProgress(0, "sizing", 0, 0))
        written.truncate(0)
        screen._live.refresh()
        assert "sizing" in written.getvalue()
        assert "100 bytes" not in written.getvalue()
        screen.close()
    screen.close()


class Full(io.StringIO):
    """A file on a disk without room."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_the_start_goes_on() -> None:
    with StartScreen(Console(file=Full())) as screen:
        screen.note(StartProgress(0, "loading", 0, 0))
        screen.note(StartProgress(0, "idle", 0, 0))


def test_when_nobody_reads_stderr_any_more_the_start_goes_on_and_stdout_is_whole() -> None:
    program = """if True:
        import sys
        from phalanx.cli.progress import StartScreen
        from phalanx.protocol.client import StartProgress

        with StartScreen() as screen:
            sys.stdin.read()
            for phase in ("loading", "idle"):
                screen.note(StartProgress(0, phase, 0, 0))
        print("it serves")
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stderr.close()
        process.stdin.close()
        assert (process.stdout.read(), process.wait(60)) == (b"it serves\n", 0)


@pytest.mark.parametrize("place", [">/dev/full", ">&-"])
def test_who_cannot_say_that_it_is_ready_serves(place: str) -> None:
    program = "from phalanx.cli.serve import _say; _say('it serves'); _say('still'); print('served')"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {place}', sys.executable, program], timeout=60)
    assert done.returncode == 0
