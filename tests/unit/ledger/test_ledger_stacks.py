"""Stacks of a process that does not help."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from phalanx.ledger import stacks
from phalanx.ledger.stacks import stack_of

WAYS = {
    "loop": "while True: pass",
    "gil": "re.match(r'(a*)*b', 'a' * 60)",  # one call into C that takes years and keeps the GIL
    "sleep": "time.sleep(600)",
}


@contextmanager
def process(way: str) -> Iterator[tuple[int, int]]:
    program = f"""
import re, time
from phalanx.ledger.stacks import offer_stacks
def busy():
    print(offer_stacks(), flush=True)
    {WAYS[way]}
busy()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        yield child.pid, int(child.stdout.readline())
    finally:
        child.kill()
        child.communicate()


def functions(lines: Sequence[str]) -> list[str]:
    """Without the numbers of their lines: a process may not have come to its loop when it is first asked."""
    return [line.rpartition(" in ")[2] for line in lines]


@pytest.mark.parametrize("way", WAYS)
def test_what_it_is_at(way: str) -> None:
    with process(way) as (pid, descriptor):
        for _ in range(3):
            lines = stack_of(pid, descriptor, timeout_s=5.0)
            assert any(re.fullmatch(r"<string>:\d+ in busy", line) for line in lines), lines


def test_its_memory_does_not_grow_with_each_question() -> None:
    with process("loop") as (pid, descriptor):
        sizes = set()
        for _ in range(10):
            assert stack_of(pid, descriptor, timeout_s=60.0)
            sizes.add(os.stat(f"/proc/{pid}/fd/{descriptor}").st_size)
        assert max(sizes) < 2 * min(sizes)


def test_many_may_ask_at_once() -> None:
    with process("loop") as (pid, descriptor), ThreadPoolExecutor(4) as threads:
        answers = threads.map(lambda _: functions(stack_of(pid, descriptor, timeout_s=60.0)), range(12))
        assert list(answers) == [["busy", "<module>"]] * 12


def test_one_who_asks_and_is_stopped_keeps_nobody_from_asking() -> None:
    with process("loop") as (pid, descriptor), open(f"/proc/{pid}/fd/{descriptor}", "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert stack_of(pid, descriptor, timeout_s=2.0)
        other.truncate(0)  # it goes on meanwhile
        assert stack_of(pid, descriptor, timeout_s=2.0)


def test_an_answer_is_read_though_somebody_clears_the_memory_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_is_our_turn", lambda *_: False)
    with process("loop") as (pid, descriptor), ThreadPoolExecutor(1) as threads:
        alone, _ = (functions(stack_of(pid, descriptor, timeout_s=60.0)) for _ in range(2))
        os.kill(pid, signal.SIGSTOP)
        asked = threads.submit(stack_of, pid, descriptor, 60.0)
        while not stacks._has_signal_in(pid, b"ShdPnd:"):
            time.sleep(0.005)
        os.truncate(f"/proc/{pid}/fd/{descriptor}", 0)
        os.kill(pid, signal.SIGCONT)
        assert functions(asked.result()) == alone


def test_one_that_is_stopped_or_gone_does_not_answer() -> None:
    with process("sleep") as (pid, descriptor):
        os.kill(pid, signal.SIGSTOP)
        assert stack_of(pid, descriptor, timeout_s=0.2) == ()
    assert stack_of(pid, descriptor) == ()


def test_a_file_that_has_come_in_place_of_its_memory_is_not_touched(tmp_path: Path) -> None:
    """Nor is it by the process itself, which is not asked. Such a program has closed all descriptors that it found."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    program = f"""
import os, time
from phalanx.ledger.stacks import offer_stacks
descriptor = offer_stacks()
os.dup2(os.open({str(precious)!r}, os.O_RDWR | os.O_APPEND), descriptor)
print(descriptor, flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert stack_of(child.pid, int(child.stdout.readline()), timeout_s=0.2) == ()
        assert precious.read_text() == "precious"
    finally:
        child.kill()
        child.communicate()


def test_a_handler_of_the_program_is_respected() -> None:
    program = """
import signal
from phalanx.ledger.stacks import STACKS_SIGNAL, may_offer, offer_stacks
mine = lambda *_: None
signal.signal(STACKS_SIGNAL, mine)
assert offer_stacks() == 0 and not may_offer() and signal.getsignal(STACKS_SIGNAL) is mine
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_that_does_not_handle_the_signal_any_more_outlives_the_question() -> None:
    """Nor has it to have a standard input."""
    program = """
import os, signal, time
from phalanx.ledger.stacks import STACKS_SIGNAL, may_offer, offer_stacks
os.closerange(0, 1)
descriptor = offer_stacks()
assert may_offer()
signal.signal(STACKS_SIGNAL, signal.SIG_DFL)
print(descriptor, flush=True)
time.sleep(600)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        descriptor = int(child.stdout.readline())
        assert descriptor
        assert stack_of(child.pid, descriptor, timeout_s=0.2) == ()
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()
