"""What lasts ends by itself, and is what it says."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

from phalanx.testing import harm
from phalanx.transport.liveness import Party, state_of

CHILD = "import sys; from phalanx.testing import harm; harm.{}({}); print('on'); sys.stdout.flush()"


def test_a_stopped_process_goes_on_when_its_time_is_over() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD.format("stop", 0.5)], stdout=subprocess.PIPE) as child:
        start_time = Party.of("the child", child.pid).start_time
        expires_at = time.monotonic() + 20
        while (state := state_of(child.pid, start_time)) != "T":
            assert state is not None and time.monotonic() < expires_at
            time.sleep(0.001)
        out, _ = child.communicate(timeout=20)
    assert out == b"on\n" and child.returncode == 0


def test_a_wedge_holds_the_gil_whatever_signal_comes() -> None:
    program = (
        "import threading, time, signal, os\n"
        "from phalanx.testing import harm\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "ticks = []\n"
        "def tick():\n"
        "    while True: ticks.append(time.monotonic()); time.sleep(0.001)\n"
        "threading.Thread(target=tick, daemon=True).start()\n"
        "time.sleep(0.05)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "began = time.monotonic(); harm.wedge(0.4); ended = time.monotonic()\n"
        "inside = [t for t in ticks if began + 0.02 < t < ended - 0.02]\n"
        "print(ended - began >= 0.39, len(inside))\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True).stdout
    assert out == b"True 0\n"


def test_what_is_over_at_once() -> None:
    began_at = time.monotonic()
    harm.loop(0.01)
    harm.slow(0.01)
    assert time.monotonic() - began_at >= 0.02
    with pytest.raises(harm.InjectedError):
        harm.fail()
    with subprocess.Popen([sys.executable, "-c", CHILD.format("kill", "")]) as child:
        assert child.wait(20) == -signal.SIGKILL


def test_a_connection_over_which_nothing_arrives_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        pair = socket.socketpair()  # not of TCP
        with far, pair[0], pair[1]:
            far.settimeout(20)
            assert harm.silence(0.5) >= 2, "both ends are this process's"
            sent_at = time.monotonic()
            near.send(b"word")
            pair[0].send(b"other")
            assert pair[1].recv(5) == b"other" and time.monotonic() - sent_at < 0.5
            assert far.recv(4) == b"word" and time.monotonic() - sent_at > 0.4
