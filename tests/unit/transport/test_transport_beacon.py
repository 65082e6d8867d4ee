"""Beacons: found by their name as long as their process lives, and only whole."""

from __future__ import annotations

import os
import subprocess
import sys

from phalanx.transport.beacon import Beacon, beacons, beacons_of, descriptors_of

PROGRAM = """
import os, signal, sys
from phalanx.transport.beacon import Beacon
shown = Beacon(sys.argv[1], b"content")
print("lit", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_it_is_there_until_it_is_closed() -> None:
    name = f"test-{os.getpid()}"
    with Beacon(name, b"one"), Beacon(name, b"two" * 100_000):
        assert beacons_of(os.getpid(), name) == [b"one", b"two" * 100_000]
        assert (os.getpid(), b"one") in list(beacons(name))
        assert len(descriptors_of(os.getpid(), name)) == 2
        assert beacons_of(os.getpid(), name + "-") == []
    assert list(beacons(name)) == []


def test_half_a_beacon_is_none() -> None:
    fd = os.memfd_create("phalanx:half", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"hal")
    assert beacons_of(os.getpid(), "half") == []
    os.close(fd)


def test_of_a_stopped_process_until_it_is_gone() -> None:
    name = f"test-of-{os.getpid()}"
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, name], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "lit\n"
        assert list(beacons(name)) == [(child.pid, b"content")]
    finally:
        child.kill()
        child.wait(10)
        child.communicate()
    assert list(beacons(name)) == [] and beacons_of(child.pid, name) == []
