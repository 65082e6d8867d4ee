"""What contestants of control_plane.py share. Runs in the peer's virtual environment too: standard library only.

A contestant is a process with its workers. It takes orders, one JSON object a line, on the descriptor that its first
argument names, and answers with one line each: the times of its calls, and the CPU time of all its processes meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

NUM_REQUESTS = 256
BLOCK_SIZE = 16
LARGE_BYTES = {"1 MB": 1_000_000, "30 MB": 30_000_000}
_CLONE_NEWNET = 0x40000000

Call = Callable[[], None]


def num_workers() -> int:
    """The contestant's second argument."""
    return int(sys.argv[2])


class SecondHost(NamedTuple):
    """The third to fifth argument, of contestants whose workers are on another host: a network namespace here."""

    brain_address: str
    worker_address: str
    namespace: str

    @classmethod
    def of_arguments(cls) -> SecondHost:
        return cls(*sys.argv[3:6])

    def enter(self) -> None:
        """Have this thread, and what it starts, live there from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(self.namespace) as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}")


def serve(calls: Mapping[str, Call], worker_pids: list[int]) -> None:
    """Carry out orders until there are no more."""
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rw") as orders:
        print("ready", file=orders, flush=True)
        for line in orders:
            order = json.loads(line)
            call = calls[order["payload"]]
            for _ in range(order["num_warm_up"]):
                call()
            answer = _measure(call, order["num_calls"], order["pace_s"], [os.getpid(), *worker_pids])
            print(json.dumps(answer), file=orders, flush=True)


def _measure(call: Call, num_calls: int, pace_s: float, pids: list[int]) -> dict[str, object]:
    times_s = []
    cpu_before_s, started = _cpu_s(pids), time.perf_counter()
    for n in range(num_calls):
        if pace_s:
            time.sleep(max(0.0, started + n * pace_s - time.perf_counter()))
        call_started = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - call_started)
    wall_s = time.perf_counter() - started
    return {"times_s": times_s, "cores": (_cpu_s(pids) - cpu_before_s) / wall_s}


def _cpu_s(pids: list[int]) -> float:
    """CPU time of all threads of these processes, to the nanosecond (/proc/PID/stat has 10 ms)."""
    total_ns = 0
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                total_ns += int(file.read().split()[0])
    return total_ns / 1e9
