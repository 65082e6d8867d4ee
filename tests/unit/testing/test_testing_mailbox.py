"""A fault reaches a process from another one, and its report comes back, also when the process is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from phalanx.errors import UserError
from phalanx.testing.faults import Fault, Injected
from phalanx.testing.mailbox import Mailbox

CHILD = """
import os, signal, sys, time
import msgspec
from phalanx.errors import UserError
from phalanx.testing.faults import Injected
from phalanx.testing.mailbox import receive_faults

def arm(fault, report):
    if fault.kind == "link":
        raise UserError("there is none")
    file = os.open(report, os.O_WRONLY | os.O_APPEND)
    os.write(file, msgspec.json.encode(Injected(at_ns=7, step=fault.step)) + b"\\n")
    os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGCONT)
    print("armed", flush=True)

receive_faults(arm)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_fault_is_sent_and_reported() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        with Mailbox(child.pid) as mailbox:
            for step in (3, 4):  # what came before is forgotten
                mailbox.send(Fault(kind="slow", rank=0, step=step))
                assert child.stdout.readline() == "armed\n"
                assert mailbox.injected() == [Injected(at_ns=7, step=step)] and mailbox.refusal() is None
            mailbox.send(Fault(kind="link", rank=0))
            expires_at = time.monotonic() + 20
            while mailbox.refusal() is None:
                assert time.monotonic() < expires_at
                time.sleep(0.002)
            assert (mailbox.refusal(), mailbox.injected()) == ("there is none", [])
            mailbox.send(Fault(kind="kill", rank=0, step=5))
            assert child.wait(20) == -signal.SIGKILL
            assert mailbox.injected() == [Injected(at_ns=7, step=5)]
            with pytest.raises(ProcessLookupError):
                mailbox.send(Fault(kind="kill", rank=0))


def test_a_process_that_takes_none() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        with pytest.raises(UserError, match="takes no faults: its engine was not started with --allow-chaos"):
            Mailbox(child.pid)
        assert child.poll() is None, "it was sent nothing, which would have killed it"
        child.kill()
