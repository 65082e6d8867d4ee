"""A real Ray cluster on hosts made of namespaces: a head on the first one, a node on each of the others."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
from hosts import Host, Network

_RAY = str(Path(sys.executable).with_name("ray"))
_PORT = 6379
_HOME = "/tmp/home"
_OBJECT_STORE_BYTES = 80 << 20
_START_TIMEOUT_S = 120.0
_POLL_S = 0.02

_IDLE_WORKER = "ray::IDLE"
"""A process that Ray keeps for later: what ran in it has ended."""
_SESSIONS = "/tmp/ray/"
"""Ray keeps its logs of what has ended."""

_AWAIT_NODES = """
import json, sys, time, ray
ray.init("auto", logging_level="error")
while sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]) != json.loads(sys.argv[1]):
    time.sleep(0.1)
"""


class RayCluster:
    """Ray with token authentication. Every host is a node, with its own address; this ends with the hosts."""

    def __init__(self, network: Network, num_cpus: Mapping[str, int]) -> None:
        """Blocks until the nodes are there; `num_cpus` is for Ray's bookkeeping."""
        self.hosts = network.hosts
        self.cables = network.cables
        self.head = next(iter(self.hosts.values()))
        self.address = f"{self.head.address}:{_PORT}"
        # A Ray that was started in this process has left its mode here.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**inherited, "HOME": _HOME, "PYTHONUNBUFFERED": "1"}
        self._num_cpus = num_cpus
        self._own_processes: dict[str, list[psutil.Process]] = {}
        self._own_files: dict[str, set[str]] = {}
        token = secrets.token_hex(32).encode()
        for host in self.hosts.values():
            host.run("sh", "-c", f"mkdir -p {_HOME}/.ray && cat > {_HOME}/.ray/auth_token", input=token)
        self._start(self.hosts.values())

    def heal(self) -> None:
        """Start Ray anew on the nodes that have lost it, and wait until Ray says that all are there."""
        lost = [host for host in self.hosts.values() if self.raylet(host) is None]
        for host in lost:
            for process in host.processes():
                process.kill()
        self._start(lost)
        names = json.dumps(sorted(self.hosts))
        self.python(self.head, "-c", _AWAIT_NODES, names, timeout_s=_START_TIMEOUT_S)

    def raylet(self, host: Host) -> psutil.Process | None:
        """Ray's process on a node that all others there end with."""
        own = self._own_processes.get(host.name, [])
        return next((process for process in own if process.is_running() and process.name() == "raylet"), None)

    def ranks(self, host: Host) -> list[psutil.Process]:
        """The processes that compute, of all lines: each is forked from the fork server of its actor."""
        forked = {p.pid: p for p in host.processes() if "phalanx.executor.fork_server" in command_of(p)}
        return [process for process in forked.values() if _parent_of(process) in forked]

    def python(self, host: Host, *arguments: str, timeout_s: float) -> str:
        """What Python prints on a host, in the environment of a user of the cluster."""
        return host.run(sys.executable, *arguments, timeout_s=timeout_s, env=self.environment)

    def leftovers(self) -> list[str]:
        """Processes (and so their ports) and files on any host that are not Ray's own."""
        return [thing for host in self.hosts.values() for thing in self._leftovers_of(host)]

    def expect_clean(self, within_s: float) -> None:
        """Wait until nothing is left of what ran on the cluster. Raises AssertionError."""
        expires_at = time.monotonic() + within_s
        while (left := self.leftovers()) and time.monotonic() < expires_at:
            time.sleep(_POLL_S)
        assert not left, f"left {within_s} s later: {left}"

    def _start(self, hosts: Iterable[Host]) -> None:
        starting = {host: self._ray_start(host) for host in hosts}
        for host, command in starting.items():
            printed, _ = command.communicate(timeout=_START_TIMEOUT_S)
            assert command.returncode == 0, f"Ray did not start on {host.name}: {printed.decode()}"
        for host in starting:
            self._own_processes[host.name] = host.processes()
            self._own_files[host.name] = host.files("/tmp") | host.files("/dev/shm")

    def _ray_start(self, host: Host) -> subprocess.Popen[bytes]:
        if host is self.head:
            role = ["--head", "--port", str(_PORT), "--include-dashboard=false"]
        else:
            role = ["--address", self.address]
        command = [_RAY, "start", *role, "--node-ip-address", host.address, "--disable-usage-stats"]
        command += ["--num-cpus", str(self._num_cpus[host.name]), "--object-store-memory", str(_OBJECT_STORE_BYTES)]
        # A head finds out that there is a token; other nodes have to be told.
        environment = {**self.environment, "RAY_AUTH_MODE": "token"}
        return host.popen(*command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _leftovers_of(self, host: Host) -> list[str]:
        rays = self._own_processes[host.name]
        commands = {process.pid: command_of(process) for process in host.processes() if process not in rays}
        others = [
            f"process {pid}: {line}" for pid, line in commands.items() if line and not line.startswith(_IDLE_WORKER)
        ]
        files = host.files("/tmp") | host.files("/dev/shm")
        others += [path for path in sorted(files - self._own_files[host.name]) if not path.startswith(_SESSIONS)]
        return [f"{host.name}: {thing}" for thing in others]


def _parent_of(process: psutil.Process) -> int | None:
    """None if it has ended."""
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def command_of(process: psutil.Process) -> str:
    """Empty if it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
