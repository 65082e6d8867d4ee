"""Nodes of a Ray cluster on hosts made of namespaces, as the cluster's tests have them, and what kills processes there.

A program on the first host asks the process outside, which made the hosts, over its standard output and input: a line
of JSON each way. Pids are those that the hosts themselves have.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from phalanx.testing.holdings import command_of
from phalanx.testing.reach import Place

sys.path.append(str(Path(__file__).parents[1] / "tests" / "cluster"))
from hosts import Host, Network, why_no_hosts
from ray_cluster import RayCluster

__all__ = ["Orders", "RayHosts", "why_no_hosts"]

AGENT = b"ray::NodeAgent"
GONE_S = 30.0
END_S = 60.0


class Order(msgspec.Struct, frozen=True):
    """Of a program on a host: tell processes of all hosts, or kill one."""

    tell: Literal["ranks", "agents"] = "ranks"
    kill: Place | None = None


class Answer(msgspec.Struct, frozen=True):
    places: tuple[Place, ...] = ()
    is_gone: bool = False
    """Of a kill: there was no such process."""


class Orders:
    """A `Reach` to all hosts, from a program on one of them."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed goes there

    def ranks_beside(self, one: Place) -> Callable[[], Sequence[Place]]:
        """All there are: no other engine is on these hosts."""
        return lambda: self._ask(Order(tell="ranks")).places

    def agents(self) -> Sequence[Place]:
        return self._ask(Order(tell="agents")).places

    def kill(self, place: Place) -> None:
        if self._ask(Order(kill=place)).is_gone:
            raise ProcessLookupError(f"{place} is gone")

    def _ask(self, order: Order) -> Answer:
        with self._asking:
            self._out.write(msgspec.json.encode(order) + b"\n")
            self._out.flush()
            return msgspec.json.decode(sys.stdin.buffer.readline(), type=Answer)


class RayHosts:
    """Two hosts, each a node of a Ray of its own."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster

    @classmethod
    @contextmanager
    def made(cls, num_cpus: int, visible: Sequence[Path]) -> Iterator[RayHosts]:
        """With so many of Ray's CPUs each. `visible`: folders of /tmp to be seen on both."""
        cpus: Mapping[str, int] = {"alpha": num_cpus, "beta": num_cpus}
        with ExitStack() as stack:
            yield cls(RayCluster(Network(stack, tuple(cpus), visible), cpus))

    def run(self, command: Sequence[str]) -> int:
        """Run a program on the first host, and do what it asks for; its exit status."""
        head = self._cluster.head
        with head.popen(
            *command, env=self._cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as program:
            assert program.stdin is not None and program.stdout is not None
            try:
                for line in program.stdout:
                    answer = self._do(msgspec.json.decode(line, type=Order))
                    program.stdin.write(msgspec.json.encode(answer) + b"\n")
                    program.stdin.flush()
                return program.wait(END_S)
            finally:
                program.kill()  # the hosts end what it has started

    def leftovers(self) -> list[str]:
        """What is left on the hosts when all has had time to go."""
        try:
            self._cluster.expect_clean(GONE_S)
        except AssertionError as error:
            return [str(error)]
        return []

    def _told(self, host: Host, what: Literal["ranks", "agents"]) -> Iterator[Place]:
        if what == "ranks":
            found = self._cluster.ranks(host)
        else:
            found = [process for process in host.processes() if command_of(process.pid).startswith(AGENT)]
        for process in found:
            if (pid := _own_pid(process.pid)) is not None:
                yield Place(host.name, pid)

    def _do(self, order: Order) -> Answer:
        hosts = self._cluster.hosts
        if order.kill is None:
            return Answer(places=tuple(place for host in hosts.values() for place in self._told(host, order.tell)))
        for process in hosts[order.kill.node].processes():
            if _own_pid(process.pid) == order.kill.pid:
                process.send_signal(signal.SIGKILL)
                return Answer()
        return Answer(is_gone=True)


def _own_pid(pid: int) -> int | None:
    """The number that a process has on its own host; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), None)
