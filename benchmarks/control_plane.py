"""Round trip of a call from the brain to its workers and back: Phalanx's MessageQueue against vLLM's.

    python benchmarks/control_plane.py [--peer-python PATH] [--workers 1 --workers 2 --workers 4] [--short]

Payloads: a tiny call; a decode step of 256 requests (our StepPlan, vLLM's SchedulerOutput); arrays of 1 MB and 30 MB.
Every worker answers every call with next to nothing. Calls follow each other at once, or come every 10 ms as steps do.
The two systems take turns, in rounds; whose turn it is not is stopped (SIGSTOP), with its workers. "cores" is the CPU
time of brain and workers, over the time that passed; the ratio is ours to vLLM's, the median over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

CONTESTANTS = Path(__file__).parent / "contestants"
START_TIMEOUT_S = 180.0
PACE_S = 0.010


class Case(NamedTuple):
    payload: str
    pace_s: float
    num_calls: int
    num_warm_up: int = 3


class Figures(NamedTuple):
    """Of one round, or the medians over several."""

    median_us: float
    p99_us: float
    cores: float


CASES = [
    Case("tiny", 0.0, 2000),
    Case("tiny", PACE_S, 100),
    Case("step", 0.0, 1000),
    Case("step", PACE_S, 100),
    Case("1 MB", 0.0, 100),
    Case("1 MB", PACE_S, 50),
    Case("30 MB", 0.0, 10),
]


class Contestant:
    """One system's brain and workers, in a process group of their own."""

    def __init__(self, name: str, command: list[str], *more: object) -> None:
        """`more` are arguments after the descriptor for orders; the first is the number of workers."""
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [*command, str(theirs.fileno()), *map(str, more)]
            self._process = subprocess.Popen(
                arguments,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        ours.settimeout(START_TIMEOUT_S)
        self._connection = ours
        self._answers = ours.makefile("r")
        if self._answers.readline() != "ready\n":
            raise click.ClickException(f"{name} did not start: {' '.join(arguments)}")
        self._signal(signal.SIGSTOP)

    def measure(self, case: Case) -> Figures:
        self._signal(signal.SIGCONT)
        self._connection.sendall(json.dumps(case._asdict()).encode() + b"\n")
        answer = json.loads(self._answers.readline())
        self._signal(signal.SIGSTOP)
        times_us = sorted(t * 1e6 for t in answer["times_s"])
        return Figures(statistics.median(times_us), times_us[int(0.99 * len(times_us))], answer["cores"])

    def close(self) -> None:
        """Lets it leave in good order, if it can."""
        self._signal(signal.SIGCONT)
        self._answers.close()
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)


@contextlib.contextmanager
def contest(peer_python: Path | None, num_workers: int) -> Iterator[list[Contestant]]:
    """Ours first, then vLLM if there is one. What the latter leaves in /dev/shm is removed."""
    commands = {"phalanx": [sys.executable, str(CONTESTANTS / "phalanx_queue.py")]}
    if peer_python is not None:
        commands["vllm"] = [str(peer_python), str(CONTESTANTS / "vllm_queue.py")]
    left_before = set(os.listdir("/dev/shm"))
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, command in commands.items():
            contestants.append(Contestant(name, command, num_workers))
            stack.callback(contestants[-1].close)
        yield contestants
    for name in set(os.listdir("/dev/shm")) - left_before:
        click.echo(f"left behind in /dev/shm: {name}")
        os.unlink(f"/dev/shm/{name}")


def over_rounds(rounds: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*rounds, strict=True)))


def report(case: Case, rounds: list[list[Figures]], num_workers: int) -> None:
    """One line: ours, vLLM's if it took part, and the ratio of the two."""
    columns = [over_rounds(column) for column in zip(*rounds, strict=True)]
    cells = [f"{c.median_us:9.1f} {c.p99_us:9.1f} {c.cores:6.2f}" for c in columns]
    if len(columns) == 2:
        cells.append(f"{statistics.median(ours.median_us / theirs.median_us for ours, theirs in rounds):6.2f}")
    pace = f"every {case.pace_s * 1e3:.0f} ms" if case.pace_s else "at once"
    click.echo(f"{num_workers:7} {case.payload:>6} {pace:>11} " + "  ".join(cells))


@click.command()
@click.option("--peer-python", type=click.Path(path_type=Path), help="Python of a virtual environment with vLLM.")
@click.option("--workers", type=click.IntRange(1, 64), multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--short", is_flag=True, help="A tenth of the calls: to see that it works.")
def main(peer_python: Path | None, workers: tuple[int, ...], rounds: int, short: bool) -> None:
    """Measure calls to 1, 2 and 4 workers. Times in microseconds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestants, stopped ones too, are ended
    if peer_python is not None and not peer_python.exists():
        click.echo(f"skipped vLLM: there is no {peer_python}")
        peer_python = None
    elif peer_python is None:
        click.echo("skipped vLLM: give --peer-python to compare")
    header = f"{'median':>9} {'p99':>9} {'cores':>6}"
    click.echo(f"workers   call        calls {header}  " + (f"{header}   ratio" if peer_python else ""))
    for num_workers in workers:
        with contest(peer_python, num_workers) as contestants:
            for case in CASES:
                if short:
                    case = case._replace(num_calls=max(3, case.num_calls // 10))
                figures = [[contestant.measure(case) for contestant in contestants] for _ in range(rounds)]
                report(case, figures, num_workers)


if __name__ == "__main__":
    main()
