"""A program that knows nothing of Phalanx: worlds of three Gloo ranks, one after the other, each with its own fault.

Usage: python watched_program.py EVENTS SCENARIO...; a scenario is FAULT-CULPRIT, or `pause`. Each lasts until a line
has come into the file EVENTS, or its ranks have ended.
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


def run(name: str, rank: int, store: str) -> None:
    fault, _, culprit = name.partition("-")
    is_culprit = culprit == str(rank)
    os.environ["TORCHELASTIC_RUN_ID"] = name
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
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


def size_of(events: str) -> int:
    return Path(events).stat().st_size


def main() -> None:
    events, *names = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            told = size_of(events)
            ranks = [context.Process(target=run, args=(name, rank, f"{directory}/{name}")) for rank in range(SIZE)]
            for one in ranks:
                one.start()
            expires_at = time.monotonic() + NEVER_S
            while size_of(events) == told and time.monotonic() < expires_at:
                time.sleep(0.02)
                if not any(one.is_alive() for one in ranks):
                    expires_at = min(expires_at, time.monotonic() + SETTLED_S)
            for one in ranks:
                one.kill()
            for one in ranks:
                one.join()
            time.sleep(SETTLED_S)  # for what is told of these


if __name__ == "__main__":
    main()
