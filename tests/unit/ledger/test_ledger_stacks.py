"""Stacks of a process that does not help."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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


@pytest.mark.parametrize("way", WAYS)
def test_what_it_is_at(way: str) -> None:
    with process(way) as (pid, descriptor):
        for _ in range(3):
            lines = stack_of(pid, descriptor, timeout_s=5.0)
            assert any(re.fullmatch(r"<string>:\d+ in busy", line) for line in lines), lines


def test_one_that_is_stopped_or_gone_does_not_answer() -> None:
    with process("sleep") as (pid, descriptor):
        os.kill(pid, signal.SIGSTOP)
        assert stack_of(pid, descriptor, timeout_s=0.2) == ()
    assert stack_of(pid, descriptor) == ()
