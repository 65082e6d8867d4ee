"""What `phalanx watch` costs a program that is not ours: an all_reduce of 16 numbers between two Gloo ranks.

    python benchmarks/torch_hook.py [--rounds 7]

Each round runs the program plainly, watched, and with TORCH_DISTRIBUTED_DEBUG=DETAIL, one after the other, in an order
that changes. Prints the medians, in µs a call, and the medians of the rounds' ratios to the plain run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = ("plain", "watched", "detail")
NUM_CALLS = 2000
NUM_LOOPS = 7


def rank() -> None:
    """What each rank does; the first prints µs a call."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x, took = torch.ones(16), []
    for _ in range(NUM_LOOPS):
        start = time.perf_counter()
        for _ in range(NUM_CALLS):
            dist.all_reduce(x)
        took.append((time.perf_counter() - start) / NUM_CALLS * 1e6)
    if dist.get_rank() == 0:
        print(min(took))


def measured(way: str) -> float:
    """µs a call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "--rank"]
    if way == "watched":
        command = [sys.executable, "-m", "phalanx", "watch", "--", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if way == "detail":
        environment["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", action="store_true")
    arguments = parser.parse_args()
    if arguments.rank:
        rank()
        return
    rounds = []
    for i in range(arguments.rounds):
        order = WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]
        rounds.append({way: measured(way) for way in order})
    for way in WAYS:
        median = statistics.median(one[way] for one in rounds)
        ratio = statistics.median(one[way] / one["plain"] for one in rounds)
        print(f"{way:8} {median:7.1f} µs   {ratio:.2f} times")


if __name__ == "__main__":
    main()
