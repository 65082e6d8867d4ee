"""Seeded faults in real engines: how soon the ledger names whom, and how often it is right.

    python benchmarks/faults.py [--count 1000] [--seed 1] [--lanes 2] [--sizes 2,4,8] [--output faults.jsonl]

Each fault has an engine of its own, with a tiny model: over 2, 4 or 8 processes, tensor, pipeline and expert
parallel, over shared memory or Gloo. It is warmed up, the fault is armed in the one rank that is to blame, and then
there is work: prompts, single tokens, or none (an idle rank is hurt before the work comes). The culprit writes down
what it is about to do and the verdict is compared with that. Times are from the harm to the verdict; those that a rank
tells of itself (an exception) and those of the start to the error that names it.

Fault i of a seed is always the same: `--only 17` repeats one, with all that was said. What an output file has already
is not done again. Two lanes run two engines at a time.

The first table has the times beside how soon verdicts are to come. They are of use only from a machine that does
nothing else and has a core for each rank: `--lanes 1 --sizes 2` on two cores.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from phalanx.config import Config
from phalanx.executor.shared_fate import die_with_parent
from phalanx.testing.chaos import Outcome, settings_for_chaos, try_fault
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import FaultPlan
from phalanx.testing.faults import World as RankWorld
from phalanx.testing.tally import happened, table, targets_table
from phalanx.testing.warm_launcher import WarmStart

LOOK_S = 0.5
START_SHARE = 0.03
"""Of the faults, those that come while the ranks join."""

_EXPERTS: dict[str, Any] = {"enable_expert_parallel": True}


class World(NamedTuple):
    """A grid, and the model that runs on it."""

    name: str
    family: str
    settings: dict[str, Any]


WORLDS = {
    2: (
        World("tp2", "llama", {"tensor_parallel_size": 2}),
        World("tp2 gloo", "llama", {"tensor_parallel_size": 2, "collective_backend": "gloo"}),
        World("pp2", "llama", {"pipeline_parallel_size": 2}),
        World("dp2 experts", "qwen3_moe", {"data_parallel_size": 2, **_EXPERTS}),
    ),
    4: (
        World("tp4", "llama", {"tensor_parallel_size": 4}),
        World("tp2 pp2", "llama", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        World("dp2 tp2 experts", "qwen3_moe", {"data_parallel_size": 2, "tensor_parallel_size": 2, **_EXPERTS}),
        World("dp4 alltoall", "qwen3_moe", {"data_parallel_size": 4, "all2all_backend": "alltoall", **_EXPERTS}),
        World("tp4 gloo", "llama", {"tensor_parallel_size": 4, "collective_backend": "gloo"}),
    ),
    8: (
        World("tp4 pp2", "llama", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}),
        World(
            "dp2 pp2 tp2 experts",
            "qwen3_moe",
            {"data_parallel_size": 2, "pipeline_parallel_size": 2, "tensor_parallel_size": 2, **_EXPERTS},
        ),
        World(
            "dp4 tp2 alltoall",
            "qwen3_moe",
            {"data_parallel_size": 4, "tensor_parallel_size": 2, "all2all_backend": "alltoall", **_EXPERTS},
        ),
    ),
}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One fault in the output file."""

    index: int
    size: int
    world: str
    outcome: Outcome


def world_of(seed: int, index: int) -> tuple[World, int]:
    """Sizes are uniform, and so are the worlds of a size."""
    dice = random.Random(f"{seed} world {index}")
    size = dice.choice(tuple(WORLDS))
    return dice.choice(WORLDS[size]), size


def attempt(seed: int, index: int, models: Path, warm: WarmStart) -> Line:
    """Fault `index` of the seed."""
    world, size = world_of(seed, index)
    config = Config.build(model=str(models / world.family), **settings_for_chaos(**world.settings))
    dice = random.Random(f"{seed} fault {index}")
    in_start = dice.random() < START_SHARE
    if in_start:
        config = Config.build(
            model=str(models / world.family), **settings_for_chaos(**world.settings, start_timeout_s=15.0)
        )
    plan = FaultPlan.of_seed(
        dice.getrandbits(63),
        1,
        RankWorld.of(config),
        states=("start",) if in_start else ("idle", "prefill", "decode"),
    )
    outcome = try_fault(config, plan.faults[0], warm, seed=dice.getrandbits(63))
    return Line(index=index, size=size, world=world.name, outcome=outcome)


def run_lane(seed: int, indices: list[int], models: Path, output: Path) -> None:
    """One fault after the other, each a line of the file."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with WarmStart() as warm:
        for index in indices:
            os.write(file, msgspec.json.encode(attempt(seed, index, models, warm)) + b"\n")


def read_lines(output: Path) -> list[Line]:
    if not output.exists():
        return []
    found = [msgspec.json.decode(line, type=Line) for line in output.read_bytes().splitlines()]
    return sorted({line.index: line for line in found}.values(), key=lambda line: line.index)


def run(seed: int, wanted: list[int], lanes: int, models: Path, output: Path) -> list[Line]:
    """All that are missing in the file."""
    done = {line.index for line in read_lines(output)}
    missing = [index for index in wanted if index not in done]
    began_at = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_lane(seed, missing[lane::lanes], models, output))
            for lane in range(min(lanes, len(missing)))
        ]
        while any(process.poll() is None for process in processes):
            time.sleep(LOOK_S)
            num_left = len(set(wanted) - {line.index for line in read_lines(output)})
            _show(len(wanted) - num_left, len(wanted), len(missing), time.monotonic() - began_at)
    if sys.stderr.isatty():
        click.echo(err=True)
    return [line for line in read_lines(output) if line.index in wanted]


@contextlib.contextmanager
def _lane(seed: int, indices: list[int], models: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does some of them. What its engines log while they are hurt is shown only if it fails."""
    options = ["--seed", seed, "--models", models, "--output", output, "--lane", ",".join(map(str, indices))]
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, __file__, *map(str, options), "--parent", str(os.getpid())]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            if process.wait() not in (0, 143):
                log.seek(0)
                click.echo(log.read().decode(errors="replace")[-2000:], err=True)


def _show(num_done: int, count: int, num_missing: int, took_s: float) -> None:
    made = num_done - (count - num_missing)
    left_s = took_s / made * (count - num_done) if made > 0 else 0.0
    if sys.stderr.isatty():
        click.echo(f"\r{num_done} of {count} faults, {took_s:.0f} s, {left_s:.0f} s left   ", nl=False, err=True)


def report(lines: list[Line]) -> None:
    """The tables, and all that was not right."""
    outcomes = [line.outcome for line in lines]
    real = happened(outcomes)
    world_of_outcome = {id(line.outcome): line for line in lines}
    click.echo(f"{len(lines)} faults, of which {len(real)} came to be; load {os.getloadavg()[0]:.2f}\n")
    click.echo(targets_table(real) + "\n")
    for title, key in (
        ("kind", lambda outcome: str(outcome.fault.kind)),
        ("state", lambda outcome: str(outcome.fault.state)),
        ("ranks", lambda outcome: f"{world_of_outcome[id(outcome)].size} ranks"),
        ("world", lambda outcome: world_of_outcome[id(outcome)].world),
        ("culprit", lambda outcome: f"rank {outcome.fault.rank}"),
    ):
        click.echo(table(real, key, title) + "\n")
    said = Counter(
        (outcome.fault.kind, outcome.verdict.cause if outcome.verdict is not None else "an error or nothing")
        for outcome in real
    )
    click.echo("causes: " + ", ".join(f"{kind} {cause} {count}" for (kind, cause), count in sorted(said.items())))
    for line in lines:
        if line.outcome.injected is not None and not line.outcome.rightness.is_right:
            click.echo(describe(line))


def describe(line: Line) -> str:
    """One fault, what was done and what was said."""
    outcome, verdict = line.outcome, line.outcome.verdict
    said = outcome.error.splitlines()[0] if outcome.error else "nothing"
    if verdict is not None:
        where = f"step {verdict.step} group {verdict.group} sequence {verdict.sequence}"
        said = f"{verdict.cause} {verdict.culprits} {where}: {verdict.theirs} | {verdict.peers}"
    done, wrong = (
        outcome.injected,
        [
            f"{name} {answer}"
            for name, answer in msgspec.structs.asdict(outcome.rightness).items()
            if answer not in ("right", "unsaid")
        ],
    )
    truth = "it never happened"
    if done is not None:
        truth = f"step {done.step} group {done.group} sequence {done.sequence}: {done.theirs} | {done.peers}"
    return f"{line.index} ({line.world}) {outcome.fault}: {', '.join(wrong)}\n    done {truth}\n    said {said}"


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(word) for word in text.split(",") if word.isdigit())
    if not set(sizes) <= set(WORLDS) or not sizes:
        raise click.BadParameter(f"some of {', '.join(map(str, WORLDS))}")
    return sizes


@click.command()
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--lanes", type=click.IntRange(1, 64), default=2, show_default=True, help="Engines at a time.")
@click.option(
    "--sizes", default="2,4,8", show_default=True, callback=lambda *given: _sizes(given[-1]), help="Of grids, in ranks."
)
@click.option("--output", type=click.Path(path_type=Path), help="A line of JSON for each fault; what is there is kept.")
@click.option("--only", type=int, help="This one alone, with all that the engine says.")
@click.option("--models", type=click.Path(path_type=Path), hidden=True)
@click.option("--lane", hidden=True)
@click.option("--parent", type=int, hidden=True)
def main(
    count: int,
    seed: int,
    lanes: int,
    sizes: tuple[int, ...],
    output: Path | None,
    only: int | None,
    models: Path | None,
    lane: str | None,
    parent: int | None,
) -> None:
    """Break engines and see whether the ledger knows who it was."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are ended on the way out
    if lane is not None:
        assert models is not None and output is not None and parent is not None
        die_with_parent(parent)
        run_lane(seed, [int(index) for index in lane.split(",")], models, output)
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        write_checkpoint(models / "llama")
        write_checkpoint(models / "qwen3_moe", "qwen3_moe", num_experts=8)
        if only is not None:
            with WarmStart() as warm:
                line = attempt(seed, only, models, warm)
            click.echo(describe(line))
            click.echo(msgspec.json.format(msgspec.json.encode(line)).decode())
        else:
            wanted = [index for index in range(count) if world_of(seed, index)[1] in sizes]
            report(run(seed, wanted, lanes, models, output or models / "faults.jsonl"))


if __name__ == "__main__":
    main()
