"""What it costs that all replicas agree on a step: our one plan against the all-reduce of vLLM's data-parallel ranks.

    python benchmarks/coordination.py [--replicas 1 --replicas 2 --replicas 8] [--running 32] [--short]

*Ours* is everything from one step to the next but the model: plan, encoding, the ring to a process for each replica,
decoding, the answers with a token for each running request, and the commit, one after the other; async scheduling
would hide most of it. *Message* leaves out plan and commit: that alone is what tells the ranks, and brings tokens back.
*Gloo* is what vLLM 0.32 adds to the scheduling of each replica: an all-reduce of [4, replicas] int32 on the CPU, which
one replica does not need. The two take turns, in rounds; whose turn it is not is stopped. Microseconds; ratios are ours
to Gloo's, medians over the rounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence

import click
from control_plane import CONTESTANTS, Case, Contestant, Figures, over_rounds

NUM_CALLS = 300


@contextlib.contextmanager
def contest(num_replicas: int, num_running: int) -> Iterator[tuple[Contestant, Contestant | None]]:
    """Ours, and Gloo where there is more than one replica."""
    with contextlib.ExitStack() as stack:
        script = CONTESTANTS / "phalanx_steps.py"
        ours = Contestant("phalanx", [sys.executable, str(script)], num_replicas, num_running)
        stack.callback(ours.close)
        gloo = None
        if num_replicas > 1:
            gloo = Contestant("gloo", [sys.executable, str(CONTESTANTS / "gloo_steps.py")], num_replicas)
            stack.callback(gloo.close)
        yield ours, gloo


def measure(num_replicas: int, num_running: int, num_calls: int, rounds: int) -> list[list[Figures]]:
    """Of each round: our turns, our messages, and Gloo's turns if it takes part."""
    turn, message = Case("turn", 0.0, num_calls), Case("message", 0.0, num_calls)
    with contest(num_replicas, num_running) as (ours, gloo):
        return [
            [ours.measure(turn), ours.measure(message), *([gloo.measure(turn)] if gloo else [])] for _ in range(rounds)
        ]


def report(num_replicas: int, num_running: int, rounds: Sequence[Sequence[Figures]]) -> None:
    """One line of the table."""
    cells = [
        f"{figures.median_us:8.0f} {figures.p99_us:8.0f}"
        for figures in (over_rounds(column) for column in zip(*rounds, strict=True))
    ]
    if len(cells) == 3:
        turn, message = (
            statistics.median(figures[i].median_us / figures[2].median_us for figures in rounds) for i in (0, 1)
        )
        cells.append(f"{turn:6.2f} {message:8.2f}")
    click.echo(f"{num_replicas:8} {num_running:8} | " + " | ".join(cells))


@click.command()
@click.option("--replicas", type=click.IntRange(1, 32), multiple=True, default=(1, 2, 8), show_default=True)
@click.option("--running", default=32, show_default=True, type=click.IntRange(1), help="Requests of each replica.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--short", is_flag=True, help="A tenth of the calls: to see that it works.")
def main(replicas: tuple[int, ...], running: int, rounds: int, short: bool) -> None:
    """Time a step's agreement. Times in microseconds."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestants, stopped ones too, are ended
    click.echo(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    click.echo("                  |       ours        |      message      |       Gloo        |    ratios of")
    click.echo("replicas  running |   median      p99 |   median      p99 |   median      p99 |  ours  message")
    for num_replicas in replicas:
        num_calls = NUM_CALLS // 10 if short else NUM_CALLS
        report(num_replicas, running, measure(num_replicas, running, num_calls, rounds))


if __name__ == "__main__":
    main()
