"""Several hosts on one machine: each has its own network, processes, host name, /tmp and /dev/shm; a switch joins them.

A host is a set of Linux namespaces without a name, held by its first process, which ends when the process that made it
ends, killed or not. So nothing of a host can outlive the test: no process, port, address, bridge or file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil

_CLONE_NEWNET = 0x40000000
_HOST_INIT = Path(__file__).with_name("host_init.py")
_WIRE = Path(__file__).with_name("wire.py")
_QUICK_S = 20.0
_PROGRAMS = (Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix))
_NAMESPACES = ("--pid", "--uts", "--ipc", "--net")
_UNSHARE = ("unshare", "--fork", "--kill-child", "--mount-proc", *_NAMESPACES)

_libc = ctypes.CDLL(None, use_errno=True)


def why_no_hosts() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    probe = [
        "unshare",
        "--fork",
        "--pid",
        "--mount-proc",
        "--uts",
        "--ipc",
        "--net",
        "ip",
        "link",
        "add",
        "type",
        "veth",
    ]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=_QUICK_S)
    except FileNotFoundError as error:
        return f"hosts made of namespaces need {error.filename} (util-linux, iproute2)"
    return f"namespaces or veth pairs are not allowed here: {done.stderr.strip()}" if done.returncode else None


class HostProcess:
    """A command that runs on a host. `pid` is its number outside."""

    def __init__(self, entrance: subprocess.Popen[bytes]) -> None:
        self._entrance = entrance  # nsenter, which stays outside, waits for the command and ends as it ends
        self.stdout = entrance.stdout
        self._process = _child(entrance)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._entrance.poll()

    def wait(self, timeout_s: float) -> int:
        """Exit status; minus the signal's number if it was killed. Raises subprocess.TimeoutExpired."""
        return self._entrance.wait(timeout_s)

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.is_running():
            self._process.send_signal(number)

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.send_signal(signal.SIGKILL)
        self.wait(_QUICK_S)
        if self.stdout is not None:
            self.stdout.close()


class Host:
    """One host. Commands run on it with `run` and `start`; sockets that a thread makes within `network` are its own."""

    def __init__(
        self, stack: ExitStack, name: str, addresses: Mapping[str, Sequence[str]], visible: Sequence[Path]
    ) -> None:
        """`addresses`: of all hosts, by name, for /etc/hosts. `visible`: folders of the outer /tmp to be seen on it.

        Python and these tests are seen anyway.
        """
        self.name = name
        self.addresses = addresses.get(name, ())
        known = [("127.0.0.1", "localhost"), *((a, other) for other, all_of in addresses.items() for a in all_of)]
        known_hosts = "".join(f"{address} {other}\n" for address, other in known)
        command = [
            *_UNSHARE,
            sys.executable,
            "-I",
            str(_HOST_INIT),
            name,
            known_hosts,
            *map(str, (*visible, *_PROGRAMS)),
        ]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.enter_context(holder)  # closes the pipe, which ends the host, and waits
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n", f"host {name} did not start"
        self._init = _child(holder).pid

    @property
    def address(self) -> str:
        return self.addresses[0]

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """A process outside that waits for `command`, which runs in the host's root folder, and ends as it ends."""
        return subprocess.Popen(self._entering(command), **options)

    def start(self, *command: str, **options: Any) -> HostProcess:
        """Start `command`; `options` as of subprocess.Popen."""
        return HostProcess(self.popen(*command, **options))

    def run(self, *command: str, timeout_s: float = _QUICK_S, **options: Any) -> str:
        """What `command` prints. Raises AssertionError with it if the command fails."""
        entering = self._entering(command)
        done = subprocess.run(entering, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, **options)
        printed: str = done.stdout.decode()
        assert done.returncode == 0, f"{command} on {self.name} ended with {done.returncode}: {printed}"
        return printed

    def own(self, device: str) -> list[str]:
        """Arguments of `ip link` that put `device` into this host's network."""
        return ["name", device, "netns", str(self._init)]

    @contextmanager
    def network(self) -> Iterator[None]:
        """Sockets that this thread makes meanwhile belong to this host, and go on doing so."""
        with open("/proc/thread-self/ns/net") as outer, open(f"/proc/{self._init}/ns/net") as inner:
            _enter_network(inner.fileno())
            try:
                yield
            finally:
                _enter_network(outer.fileno())

    def bytes_sent(self, device: str) -> int:
        """What has left the host through a device until now."""
        for line in Path(f"/proc/{self._init}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == device:
                return int(counters.split()[8])
        raise AssertionError(f"{self.name} has no {device}")

    def processes(self) -> list[psutil.Process]:
        """All that run on this host, but its first."""
        own = os.readlink(f"/proc/{self._init}/ns/pid")
        return [p for p in psutil.process_iter() if p.pid != self._init and _pid_namespace(p.pid) == own]

    def files(self, folder: str) -> set[str]:
        """Paths of all files below `folder` that are the host's own."""
        root = f"/proc/{self._init}/root"
        device = os.lstat(root + folder).st_dev
        found = set()
        for parent, folders, names in os.walk(root + folder):
            folders[:] = [name for name in folders if os.lstat(os.path.join(parent, name)).st_dev == device]
            found |= {os.path.join(parent, name).removeprefix(root) for name in names}
        return found

    def _entering(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--mount", *_NAMESPACES, "--", *command]


class Direction(msgspec.Struct, frozen=True):
    """What happens to the frames that go one way through a cable."""

    delay_s: float = 0.0
    loss: float = 0.0
    """Share of the frames that is lost; 1.0 cuts this direction alone."""


_CLEAR = Direction()


class Cable:
    """What joins a host's device to a bridge of the switch: a pair of virtual Ethernet devices."""

    def __init__(self, host: Host, device: str, addresses: Sequence[str], switch: Host, bridge: str) -> None:
        self._host = host
        self._device = device
        self._switch = switch
        self._bridge = bridge
        self._port = f"{host.name}-{device}"
        pair = ["ip", "link", "add", *host.own(device), "type", "veth", "peer", *switch.own(self._port)]
        subprocess.run(pair, check=True, timeout=_QUICK_S)
        switch.run("ip", "link", "set", self._port, "master", bridge, "up")
        host.run("ip", "link", "set", device, "up")
        for address in addresses:
            length, *flags = ("64", "nodad") if ":" in address else ("24",)
            host.run("ip", "address", "add", f"{address}/{length}", "dev", device, *flags)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """The host's link is down meanwhile."""
        self._host.run("ip", "link", "set", self._device, "down")
        try:
            yield
        finally:
            self._host.run("ip", "link", "set", self._device, "up")

    @contextmanager
    def impaired(self, *, sent: Direction = _CLEAR, received: Direction = _CLEAR) -> Iterator[None]:
        """Frames that the host sends, and that it receives, go through wire.py meanwhile."""
        ends, detour = (f"{self._port}-h", f"{self._port}-s"), f"{self._port}-b"
        numbers = [str(number) for way in (sent, received) for number in (way.delay_s, way.loss)]
        wire = self._switch.start(sys.executable, "-I", str(_WIRE), *ends, *numbers, stdout=subprocess.PIPE)
        with ExitStack() as stack:
            stack.callback(wire.end)
            assert wire.stdout is not None
            assert wire.stdout.readline() == b"ready\n", "the wire did not start"
            self._switch.run("ip", "link", "add", detour, "up", "type", "bridge")
            stack.callback(self._switch.run, "ip", "link", "delete", detour)
            self._switch.run("ip", "link", "set", ends[0], "master", detour, "up")
            self._switch.run("ip", "link", "set", ends[1], "master", self._bridge, "up")
            self._switch.run("ip", "link", "set", self._port, "master", detour)
            stack.callback(self._switch.run, "ip", "link", "set", self._port, "master", self._bridge)
            yield


class Network:
    """Hosts by their names, each with two devices: `eth0`, which its name stands for, and `eth1` on a network apart."""

    def __init__(self, stack: ExitStack, names: Sequence[str], visible: Sequence[Path]) -> None:
        """All of it ends with `stack`. `visible` is as for a host."""
        first = {name: (f"10.0.0.{i}", f"fd00::{i}") for i, name in enumerate(names, 1)}
        second = {name: (f"10.0.1.{i}", f"fd00:0:0:1::{i}") for i, name in enumerate(names, 1)}
        switch = Host(stack, "switch", {}, ())
        for bridge in ("first", "second"):
            switch.run("ip", "link", "add", bridge, "up", "type", "bridge")
        self.hosts = {name: Host(stack, name, first, visible) for name in names}
        self.cables = {name: Cable(host, "eth0", first[name], switch, "first") for name, host in self.hosts.items()}
        """Those of `eth0`."""
        for name, host in self.hosts.items():
            Cable(host, "eth1", second[name], switch, "second")


def _child(holder: subprocess.Popen[bytes]) -> psutil.Process:
    """The process that `holder` made in the new namespace."""
    parent = psutil.Process(holder.pid)
    expires_at = time.monotonic() + _QUICK_S
    while holder.poll() is None and time.monotonic() < expires_at:
        if children := parent.children():
            return children[0]
        time.sleep(0.001)
    raise AssertionError(f"{holder.args!r} made no process: exit status {holder.poll()}")


def _pid_namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None  # it is gone, or none of ours


def _enter_network(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
