"""The hosts that other tests are made on: they are apart, their cables do what they are told, and nothing stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from hosts import Direction, Host, Network, why_no_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]

PORT = 7777
GONE_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def network(shared: Path) -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(stack, ("alpha", "beta"), [shared])


def mailbox(host: Host) -> socket.socket:
    with host.network():
        box = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    box.bind((host.address, PORT))
    box.settimeout(0.5)
    return box


def comes_through(sender: Host, receiver: Host) -> bool:
    with mailbox(sender) as source, mailbox(receiver) as sink:
        try:
            source.sendto(b"hello", sink.getsockname())
            return sink.recv(16) == b"hello"
        except OSError:  # nothing came, or there is no link to send it on
            return False


def comes_through_soon(sender: Host, receiver: Host) -> bool:
    """A link that has come up takes a moment to carry something."""
    return any(comes_through(sender, receiver) for _ in range(10))


def test_hosts_share_nothing_but_what_is_visible(network: Network, shared: Path) -> None:
    alpha, beta = network.hosts.values()
    (shared / "seen").write_text("by all")
    for host in (alpha, beta):
        assert host.run("hostname") == f"{host.name}\n"
        assert host.run("cat", str(shared / "seen")) == "by all"
    alpha.run("touch", "/tmp/own", "/dev/shm/own")
    assert (alpha.files("/tmp"), alpha.files("/dev/shm")) == ({"/tmp/own"}, {"/dev/shm/own"})
    assert (beta.files("/tmp"), beta.files("/dev/shm")) == (set(), set())
    sleeper = alpha.start("sleep", "60")
    assert [process.pid for process in alpha.processes()] == [sleeper.pid]
    assert beta.processes() == []
    sleeper.end()
    assert alpha.processes() == []


def test_hosts_reach_each_other_by_name_and_over_both_families(network: Network) -> None:
    alpha, beta = network.hosts.values()
    assert comes_through(alpha, beta)
    for address in (*beta.addresses, "beta", "10.0.1.2", "fd00:0:0:1::2"):
        with beta.network(), socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True):
            alpha.run(sys.executable, "-c", f"import socket; socket.create_connection(({address!r}, {PORT}), 5)")


def test_a_cut_cable(network: Network) -> None:
    alpha, beta = network.hosts.values()
    with network.cables["beta"].cut():
        assert not comes_through(alpha, beta)
        assert not comes_through(beta, alpha)
    assert comes_through_soon(alpha, beta)
    assert "fd00::2" in beta.run("ip", "address", "show", "eth0")


def test_one_direction_dropped(network: Network) -> None:
    alpha, beta = network.hosts.values()
    assert comes_through_soon(alpha, beta)  # so that both know each other's hardware address
    with network.cables["beta"].impaired(sent=Direction(loss=1.0)):
        assert comes_through_soon(alpha, beta)
        assert not comes_through(beta, alpha)
    assert comes_through_soon(beta, alpha)


def test_a_stream_through_delay_and_loss(network: Network) -> None:
    alpha, beta = network.hosts.values()
    payload = os.urandom(300_000)

    def send(source: socket.socket) -> None:
        with source:
            source.sendall(payload)

    with beta.network():
        listener = socket.create_server((beta.address, PORT))
    with listener, network.cables["beta"].impaired(sent=Direction(delay_s=0.2, loss=0.05)):
        start = time.monotonic()
        with alpha.network():
            sink = socket.create_connection((beta.address, PORT), timeout=20)
        assert time.monotonic() - start > 0.2
        with sink, ThreadPoolExecutor(1) as other:
            sending = other.submit(send, listener.accept()[0])
            assert sink.makefile("rb").read() == payload
            sending.result()


_MADE_BY_A_PROCESS = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from hosts import Direction, Network

with ExitStack() as stack:
    network = Network(stack, ("alpha", "beta"), ())
    with network.cables["alpha"].impaired(sent=Direction(delay_s=0.1)):
        sleepers = [host.start("sleep", "600") for host in network.hosts.values()]
        print("ready", flush=True)
        time.sleep(600)
"""


def test_nothing_outlives_the_one_that_made_the_hosts() -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", _MADE_BY_A_PROCESS], stdout=subprocess.PIPE, cwd=Path(__file__).parent
    )
    with maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"ready\n"
        made = psutil.Process(maker.pid).children(recursive=True)
        assert len(made) > 8
        maker.kill()
        expires_at = time.monotonic() + GONE_WITHIN_S
        while (alive := [process for process in made if runs(process)]) and time.monotonic() < expires_at:
            time.sleep(0.01)
        assert alive == []


def runs(process: psutil.Process) -> bool:
    """Whether it still does; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
