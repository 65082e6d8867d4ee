"""All-reduce between CPU ranks of one host: Phalanx's shared-memory group against Gloo, in the same processes.

    python benchmarks/all_reduce.py [--ranks 2 --ranks 4] [--calls 300]

Each case runs in alternating rounds of the two, so that what else the machine does falls on both. Times are those of
rank 0, in microseconds; the ratio is that of the medians (below 1: Phalanx is faster).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import click

# Threads that spin take the cores from the ranks; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch._C import _distributed_c10d

from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.shared_memory import SharedMemoryGroup
from phalanx.collectives.spec import GroupSpec

_ROUNDS = 6
_TIMEOUT_S = 60.0
_US_PER_NS = 1e-3
# Where torch.distributed has its classes from, and more than it passes on or its stubs know.
c10d: Any = _distributed_c10d


class Case(NamedTuple):
    rows: int
    width: int
    dtype: str


class Figures(NamedTuple):
    """Microseconds."""

    median: float
    p99: float


CASES = [Case(*case) for case in product((1, 8, 32), (576, 4096), ("float32", "bfloat16"))]


@click.command()
@click.option("--ranks", "sizes", type=click.IntRange(2, 64), multiple=True, default=(2, 4), show_default=True)
@click.option("--calls", default=300, show_default=True, type=click.IntRange(_ROUNDS), help="Timed calls a case.")
def main(sizes: tuple[int, ...], calls: int) -> None:
    """Time the all-reduce of Phalanx and of Gloo."""
    load = os.getloadavg()[0]
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores, load {load:.2f}, {calls} calls a case")
    for size in sizes:
        click.echo(f"\n{size} ranks      |  phalanx µs        |  gloo µs           | ratio")
        click.echo("rows × width    |  median      p99   |  median      p99   |")
        for case, (ours, gloo) in zip(CASES, _measure(size, calls), strict=True):
            name = f"{case.rows:>2} × {case.width:<4} {'bf16' if case.dtype == 'bfloat16' else 'f32 '}"
            click.echo(
                f"{name:15} | {ours.median:8.1f} {ours.p99:8.1f}  | {gloo.median:8.1f} {gloo.p99:8.1f}  "
                f"| {ours.median / gloo.median:.3f}"
            )


def _measure(size: int, calls: int) -> list[tuple[Figures, Figures]]:
    """Figures of both groups for each case, from rank 0 of a fresh set of processes."""
    processes = multiprocessing.get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    ranks = tuple(range(size))
    with (
        open_rendezvous("ours", "shm", ranks, 0, _TIMEOUT_S, _TIMEOUT_S) as ours,
        open_rendezvous("gloo", "gloo", ranks, 0, _TIMEOUT_S, _TIMEOUT_S) as gloo,
    ):
        crew = [
            processes.Process(target=_rank, args=(ours.spec, gloo.spec, rank, calls, sender), daemon=True)
            for rank in ranks
        ]
        for process in crew:
            process.start()
        wait([receiver, *(process.sentinel for process in crew)], timeout=10 * _TIMEOUT_S)
        if not receiver.poll():
            raise click.ClickException("a rank died or took too long")
        figures: list[tuple[Figures, Figures]] = receiver.recv()
        for process in crew:
            process.join(_TIMEOUT_S)
    return figures


def _rank(ours: GroupSpec, gloo: GroupSpec, rank: int, calls: int, sender: Connection) -> None:
    torch.set_num_threads(1)
    group = SharedMemoryGroup(ours, rank)
    backend = _gloo(gloo, rank)
    with torch.inference_mode():
        figures = [_time_case(case, group, backend, calls) for case in CASES]
    if rank == 0:
        sender.send(figures)
    group.barrier()
    group.close()


def _gloo(spec: GroupSpec, rank: int) -> Any:
    """Gloo alone, without what Phalanx's own GlooGroup puts around it."""
    assert spec.store is not None
    store = c10d.FileStore(spec.store.path, spec.size)
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(interface="lo")]
    options._timeout = timedelta(seconds=_TIMEOUT_S)
    return c10d.ProcessGroupGloo(c10d.PrefixStore("gloo", store), rank, spec.size, options)


def _time_case(case: Case, group: SharedMemoryGroup, backend: Any, calls: int) -> tuple[Figures, Figures]:
    # Zeros stay zeros, however often they are added up.
    x = torch.zeros(case.rows, case.width, dtype=getattr(torch, case.dtype))
    options = c10d.AllreduceOptions()
    contestants: list[Callable[[], object]] = [
        lambda: group.all_reduce(x),
        lambda: backend.allreduce([x], options).wait(),
    ]
    times_us: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        for contestant, results in zip(contestants, times_us, strict=True):
            group.barrier()
            results += _time(contestant, calls // _ROUNDS)
    ours, theirs = (Figures(statistics.median(times), sorted(times)[int(len(times) * 0.99)]) for times in times_us)
    return ours, theirs


def _time(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds of each of `calls`, after a few that do not count."""
    for _ in range(3):
        call()
    times_us = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times_us.append((time.perf_counter_ns() - start) * _US_PER_NS)
    return times_us


if __name__ == "__main__":
    main()
