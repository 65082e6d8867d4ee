"""A program that knows nothing of Phalanx: worlds of three Gloo ranks, one after the other, each with its own fault.

Usage: python watched_program.py EVENTS SCENARIO...; a scenario is FAULT-CULPRIT, or `pause`. Each lasts until a line
has come into the file EVENTS, but for `pause`, whose ranks end by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import all_reduce  # imported by name

SIZE = 3
NEVER_S = 120
PAUSE_S = 4.0
SETTLED_S = 1.0
DEADLINE_S = 30.0
GOES_ON = ("stop", "late")


def run(name: str, rank: int, store: str) -> None:
    fault, _, culprit = name.partition("-")
    is_culprit = culprit == str(rank)
    os.environ["TORCHELASTIC_RUN_ID"] = name
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    await_watched()
    x = torch.ones(8)
    for _ in range(20):
        all_reduce(x)
    if not (fault == "skipped" and is_culprit):
        dist.all_gather([torch.empty(8) for _ in range(SIZE)], x)
    if is_culprit:
        harm(fault)
    for _ in range(3):
        if fault == "pause":
            time.sleep(PAUSE_S / 3)
        all_reduce(x)
    dist.destroy_process_group()


def await_watched() -> None:
    """A rank that ends before the watcher, which may be short of a core, has seen it cannot be judged."""
    watcher = os.environ["PHALANX_WATCH"].partition(":")[0]
    mine = 0
    for descriptor in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", descriptor)
        if path.exists() and "phalanx:journal" in os.readlink(path):
            mine = path.stat().st_ino
    expires_at = time.monotonic() + DEADLINE_S
    while f" {mine} " not in Path(f"/proc/{watcher}/maps").read_text() and time.monotonic() < expires_at:
        time.sleep(0.01)


def harm(fault: str) -> None:
    match fault:
        case "swapped":
            dist.broadcast(torch.ones(8), 0)
        case "shape":
            dist.all_reduce(torch.ones(9))
        case "exit":
            sys.exit()
        case "error":
            raise ValueError("a fault")
        case "kill" | "stop":
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        case "late":
            time.sleep(NEVER_S)


def num_told(events: str) -> int:
    return Path(events).read_bytes().count(b"\n")


def await_told(events: str, number: int) -> None:
    expires_at = time.monotonic() + DEADLINE_S
    while num_told(events) < number and time.monotonic() < expires_at:
        time.sleep(0.02)


def main() -> None:
    events, *names = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            told = num_told(events)
            ranks = [context.Process(target=run, args=(name, rank, f"{directory}/{name}")) for rank in range(SIZE)]
            for one in ranks:
                one.start()
            if name == "pause":
                for one in ranks:
                    one.join()
                time.sleep(SETTLED_S)  # for what might be told
                continue
            await_told(events, told + 1)
            for one in ranks:
                one.kill()
            for one in ranks:
                one.join()
            if name.partition("-")[0] in GOES_ON:  # that they have been killed now is told, too
                await_told(events, told + 2)


if __name__ == "__main__":
    main()
