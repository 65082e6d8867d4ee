"""`phalanx watch` runs programs that are not ours, and names the rank that did otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from phalanx.ledger.events import Event

HERE = Path(__file__).parent
PROGRAM = HERE / "watched_program.py"
DEADLINE_S = 120.0

EXPECTED = {
    "pause": None,
    "skipped-0": ("diverged", "all_reduce of 8 float32", "all_gather of 24 float32"),
    "swapped-1": ("diverged", "broadcast of 8 float32 from rank 0", "all_reduce of 8 float32"),
    "shape-2": ("diverged", "all_reduce of 9 float32", "all_reduce of 8 float32"),
    "exit-0": ("skipped", None, "all_reduce of 8 float32"),
    "error-1": ("gone", None, "all_reduce of 8 float32"),
    "kill-2": ("gone", None, "all_reduce of 8 float32"),
    "stop-0": ("stopped", None, "all_reduce of 8 float32"),
    "late-1": ("late", None, "all_reduce of 8 float32"),
}


def watch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "phalanx", "watch", *arguments]


@pytest.mark.slow
def test_every_fault_has_its_verdict_and_a_pause_has_none(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    command = watch(
        "--patience", "2", "--events", str(events), "--", sys.executable, str(PROGRAM), str(events), *EXPECTED
    )
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    verdicts = [msgspec.json.decode(line, type=Event).verdict for line in events.read_bytes().splitlines()]
    faults = {name: expected for name, expected in EXPECTED.items() if expected is not None}
    # Of ranks that are stopped or late something else is told, too, when the program kills them.
    first = [one for i, one in enumerate(verdicts) if not i or verdicts[i - 1].is_final]
    assert [(one.cause, one.theirs, one.peers) for one in first] == list(faults.values()), ended.stderr
    assert [one.culprits for one in first] == [(int(name[-1]),) for name in faults]
    assert [one.cause for one in verdicts if one not in first] == ["gone", "gone"]
    by_name = dict(zip(faults, first, strict=True))
    assert by_name["error-1"].what == "has ended with ValueError: a fault"
    assert by_name["exit-0"].what == "has ended without all_reduce of 8 float32"
    assert by_name["late-1"].what.endswith("it is in no collective")
    assert "watched_program.py" in by_name["late-1"].stacks[1][0] and set(by_name["late-1"].stacks) > {1}
    assert all(one.group == "world" and one.step is None for one in verdicts)
    assert ended.stderr.count("phalanx watch: verdict: rank ") == len(verdicts)


@pytest.mark.slow
def test_torchrun_is_ended_when_its_ranks_can_never_meet(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "dist.all_reduce(torch.ones(3 + dist.get_rank()))\n"
        "dist.barrier()\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        watch("--kill", "--", *start), env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert ended.returncode != 0
    assert "issued all_reduce of 3 float32 where the other issued all_reduce of 4 float32" in ended.stderr
    assert "which of them is wrong cannot be told" in ended.stderr and "the command is ended" in ended.stderr
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(program) in (one.info["cmdline"] or ())]


@pytest.mark.slow
def test_ranks_that_torchrun_starts_anew_are_judged_anew(tmp_path: Path) -> None:
    """Each start has a culprit of its own; and what torchrun ends because of it is none."""
    program, events = tmp_path / "train.py", tmp_path / "events.jsonl"
    program.write_text(
        "import os, signal, sys\n"
        "import torch.distributed as dist\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from watched_program import await_watched\n"
        "rank, start = int(os.environ['RANK']), os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "store = os.path.join(os.path.dirname(__file__), start)\n"  # torchrun's own has what earlier ranks have left
        "dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)\n"
        "await_watched()\n"
        "dist.barrier()\n"
        "if (rank, start) == (1, '0'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if (rank, start) == (0, '1'): raise ValueError('a fault')\n"
        "dist.barrier()\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        watch("--events", str(events), "--", *start, str(program)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stderr
    verdicts = [msgspec.json.decode(line, type=Event).verdict for line in events.read_bytes().splitlines()]
    assert [(one.cause, one.culprits, one.waiting) for one in verdicts] == [("gone", (1,), (0,)), ("gone", (0,), (1,))]
    assert verdicts[1].what == "has ended with ValueError: a fault" and verdicts[1].sequence == 2


@pytest.mark.slow
def test_a_rank_that_never_comes_to_find_the_others(tmp_path: Path) -> None:
    """It is named though it has never used torch.distributed."""
    program, events = tmp_path / "train.py", tmp_path / "events.jsonl"
    program.write_text(
        "import os, signal, subprocess, sys, time\n"
        "if 'RANK' not in os.environ:\n"
        "    told = [{**os.environ, 'RANK': str(rank), 'WORLD_SIZE': '2'} for rank in range(2)]\n"
        "    ranks = [subprocess.Popen([sys.executable, __file__], env=one) for one in told]\n"
        f"    while not os.path.getsize({str(events)!r}): time.sleep(0.02)\n"
        "    for one in ranks: one.kill()\n"
        "    sys.exit()\n"
        "from torch.distributed import init_process_group\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGSTOP)\n"
        "store = os.path.join(os.path.dirname(__file__), 'store')\n"
        "init_process_group('gloo', init_method='file://' + store, rank=int(os.environ['RANK']), world_size=2)\n"
    )
    command = watch("--events", str(events), "--", sys.executable, str(program))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    first = msgspec.json.decode(events.read_bytes().splitlines()[0], type=Event).verdict
    assert (first.cause, first.culprits, first.waiting) == ("stopped", (1,), (0,)), ended.stderr
    assert first.what == "is stopped by a signal, and has not come to init_process_group of 2 ranks"
    assert "init_process_group" in " ".join(first.stacks[0])


def test_the_exit_code_is_the_commands() -> None:
    for program, code in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("print('hi')", 0)):
        ended = subprocess.run(watch(sys.executable, "-c", program), capture_output=True, text=True, timeout=60)
        assert ended.returncode == code
        assert ended.stdout == ("hi\n" if code == 0 else "")
        assert "no process of the command has used torch.distributed" in ended.stderr


def test_a_command_that_is_not_there() -> None:
    ended = subprocess.run(watch("--", "/not/there"), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "'/not/there' is not possible: a program that can be run" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_nothing_is_left(number: signal.Signals) -> None:
    program = (
        "import signal, sys, time; signal.signal(int(sys.argv[1]), lambda *_: sys.exit(5));"
        "print(1, flush=True); time.sleep(60)"
    )
    watching = subprocess.Popen(watch(sys.executable, "-c", program, str(int(number))), stdout=subprocess.PIPE)
    assert watching.stdout is not None
    watching.stdout.readline()
    (child,) = psutil.Process(watching.pid).children()
    watching.send_signal(number)
    assert watching.wait(30) == 5
    expires_at = time.monotonic() + 5
    while child.is_running() and time.monotonic() < expires_at:
        time.sleep(0.01)
    assert not child.is_running()
    watching.stdout.close()


def run_slowly(where: str, *command: str, **options: Any) -> int:
    """The exit code of a watching process whose cores are taken: it is slow in one of the functions that it calls."""
    program = (
        "import signal, sys, time; from phalanx.cli import watched_command;"
        "from phalanx.ledger.program_watcher import ProgramWatcher;"
        f"at = {where}; name = sys.argv[1]; do = getattr(at, name);"
        "setattr(at, name, lambda *how, **named: (time.sleep(0.5), do(*how, **named))[1]);"
        "sys.exit(watched_command.run_watched(sys.argv[2:], patience_s=10, events=None, kill=False))"
    )
    return subprocess.run([sys.executable, "-c", program, *command], timeout=60, **options).returncode


def test_a_signal_that_comes_as_the_command_starts_is_passed_on() -> None:
    told = "trap 'exit 5' TERM; kill -TERM $PPID; sleep 1"
    assert run_slowly("signal", "pthread_sigmask", "sh", "-c", told) == 5


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_that_comes_as_the_command_ends_leaves_its_exit_code(name: str) -> None:
    assert run_slowly("ProgramWatcher", "look", "sh", "-c", f"sleep 0.3; kill -{name} $PPID; exit 5") == 5


def test_a_signal_that_is_ignored_stays_so() -> None:
    told = "kill -HUP $PPID; sleep 0.3; kill -HUP $$; exit 5"
    ended = subprocess.run(["nohup", *watch("sh", "-c", told)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 5
    # What is said after a signal that may have ended the command would not be said.
    assert "no process of the command has used torch.distributed" in ended.stderr


def test_the_command_has_the_descriptors_that_are_for_it() -> None:
    ours, theirs = os.pipe()
    try:
        command = watch(sys.executable, "-c", f"import os; os.write({theirs}, b'hello')")
        assert subprocess.run(command, pass_fds=[theirs], timeout=60).returncode == 0
        assert os.read(ours, 100) == b"hello"
    finally:
        os.close(ours)
        os.close(theirs)
