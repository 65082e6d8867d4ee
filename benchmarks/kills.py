"""A thousand kills of engines that serve: whether every stream is that of a run without one, and how long it paused.

    python benchmarks/kills.py [--count 1000] [--lanes 4] [--seed 1] [--sizes 2,4,8] [--output kills.jsonl]

Over 2, 4 and 8 processes, dense and mixture, tensor, pipeline and expert parallel, over shared memory or Gloo, with a
standby line and without: a rank is killed, or one that stands ready, or the process that all ranks come from, or one
rank and then another one while the next ones take over, or the engine's process; at any moment, or in a prompt's step,
a decode step, or while idle. Meanwhile there are streams of different kinds, and after each kill it is checked that
each ended once and is the same to the last token, that the right rank was blamed, that nothing is left over and that no
wait passed its deadline (phalanx.testing.checker).

An engine has twenty of them, in a process of its own; so many lanes run at a time. Kill i of a seed is always the same:
`--only 17` repeats one, and shows what its engine says. What an output file has already is not done again. Tables at
the end; the exit code is 1 if anything did not hold, or was not run. Pauses are of use only from a machine with a core
for each rank of all lanes: two lanes with 8 ranks and a standby line each are busy with 16 cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from faults import WORLDS, World

from phalanx.config import Config
from phalanx.executor.shared_fate import die_with_parent
from phalanx.testing.blows import BLOW_KINDS, BlowKind, blow_of_seed
from phalanx.testing.chaos import settings_for_chaos
from phalanx.testing.checker import Checker, Round
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import World as RankWorld
from phalanx.testing.rounds import rungs, table

KINDS: tuple[BlowKind, ...] = ("kill", "kill-standby", "kill-lines", "kill-switch", "kill-engine")
ROUNDS_PER_ENGINE = 20
NUM_STREAMS = 8
ROUND_S = 90.0
"""What a round may take, of all of a job: one that takes longer is ended."""
ENGINE_KILLED_EVERY = 10
"""Rounds: an engine that ends again and again waits longer and longer before it is started again."""
START_S = 120.0
LOOK_S = 0.2


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One round in the output file."""

    world: str
    size: int
    has_standby: bool
    round: Round


class Job(NamedTuple):
    """What one engine is for."""

    number: int
    indices: Sequence[int]
    world: World
    size: int
    has_standby: bool


def jobs(seed: int, wanted: Sequence[int], sizes: Sequence[int]) -> list[Job]:
    """Sizes take turns, and so do engines with a standby line and without; worlds are uniform."""
    by_number: dict[int, list[int]] = {}
    for index in wanted:
        by_number.setdefault(index // ROUNDS_PER_ENGINE, []).append(index)
    found = []
    for number, indices in by_number.items():
        size = sizes[number % len(sizes)]
        world = random.Random(f"{seed} world {number}").choice(WORLDS[size])
        found.append(Job(number, indices, world, size, has_standby=number // len(sizes) % 2 == 0))
    return found


def config_of(job: Job, models: Path) -> Config:
    settings = {
        "max_num_seqs": NUM_STREAMS,
        "max_model_len": 256,
        "kv_cache_memory": 4 << 20,
        "standby": int(job.has_standby),
        "engine_restarts": 100,
        **job.world.settings,
    }
    return Config.build(model=str(models / job.world.family), **settings_for_chaos(**settings))


def kinds_of(index: int, kinds: Sequence[BlowKind]) -> Sequence[BlowKind]:
    """The engine's process has rounds of its own, if it has any."""
    others = tuple(kind for kind in kinds if kind != "kill-engine")
    if len(others) == len(kinds) or not others:
        return kinds
    return ("kill-engine",) if index % ENGINE_KILLED_EVERY == ENGINE_KILLED_EVERY - 1 else others


async def carry_out(job: Job, seed: int, kinds: Sequence[BlowKind], models: Path, file: int, log: Path | None) -> None:
    """One round after the other, each a line of the file; a new engine after one that is dead."""
    config, left = config_of(job, models), list(job.indices)
    world = RankWorld.of(config)
    while left:
        checker = await Checker.start(config, num_streams=NUM_STREAMS, seed=seed + job.number, log=log)
        try:
            while left and checker.is_alive:
                index = left.pop(0)
                blow = blow_of_seed(seed, index, world, has_standby=job.has_standby, kinds=kinds_of(index, kinds))
                found = await checker.round(index, blow)
                if not left or not checker.is_alive:
                    remains = await checker.close()
                    found = msgspec.structs.replace(found, violations=(*found.violations, *remains))
                line = Line(world=job.world.name, size=job.size, has_standby=job.has_standby, round=found)
                os.write(file, msgspec.json.encode(line) + b"\n")
        finally:
            await checker.close()


def read_lines(output: Path) -> list[Line]:
    if not output.exists():
        return []
    found = [msgspec.json.decode(line, type=Line) for line in output.read_bytes().splitlines()]
    return sorted({line.round.index: line for line in found}.values(), key=lambda line: line.round.index)


class Lanes:
    """Processes that each carry out a job, so many at a time."""

    def __init__(self, options: Sequence[object], folder: Path) -> None:
        self._options = [*map(str, options)]
        self._folder = folder
        self._running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}

    def begin(self, job: Job) -> None:
        options = ["--job", job.number, "--indices", ",".join(map(str, job.indices)), "--parent", os.getpid()]
        with self._log(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, *self._options, *map(str, options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running[process] = job, time.monotonic() + START_S + ROUND_S * len(job.indices)

    def look(self) -> int:
        """How many run; says what went wrong with those that have ended."""
        for process, (job, expires_at) in list(self._running.items()):
            if process.poll() is None and time.monotonic() > expires_at:
                click.echo(f"job {job.number} ({job.world.name}) did not end in time: it is killed", err=True)
                process.kill()
                process.wait()
            if process.poll() is not None:
                del self._running[process]
                if process.returncode:
                    said = self._log(job).read_text(errors="replace")[-2000:]
                    click.echo(f"job {job.number} ({job.world.name}) failed:\n{said}", err=True)
        return len(self._running)

    def end(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30.0)
            process.kill()
            process.wait()

    def _log(self, job: Job) -> Path:
        return self._folder / f"job-{job.number}"


def run(wanted: list[Job], lanes: Lanes, num_lanes: int, output: Path, count: int) -> None:
    waiting, began_at, num_before = list(wanted), time.monotonic(), len(read_lines(output))
    try:
        while (num_running := lanes.look()) or waiting:
            while waiting and num_running < num_lanes:
                lanes.begin(waiting.pop(0))
                num_running += 1
            time.sleep(LOOK_S)
            _show(len(read_lines(output)), num_before, count, time.monotonic() - began_at)
    finally:
        lanes.end()
    if sys.stderr.isatty():
        click.echo(err=True)


def _show(num_done: int, num_before: int, count: int, took_s: float) -> None:
    made = num_done - num_before
    left_s = took_s / made * (count - num_done) if made > 0 else 0.0
    if sys.stderr.isatty():
        click.echo(f"\r{num_done} of {count} kills, {took_s:.0f} s, {left_s:.0f} s left   ", nl=False, err=True)


def report(lines: Sequence[Line], count: int) -> bool:
    """The tables, and all that was not right. Whether everything was."""
    rounds = [line.round for line in lines]
    line_of = {line.round.index: line for line in lines}
    num_happened = sum(one.has_happened for one in rounds)
    num_streams = sum(one.num_streams for one in rounds)
    click.echo(f"{len(rounds)} of {count} rounds, {num_happened} kills, {num_streams} streams;", nl=False)
    click.echo(f" pauses and gaps in ms; load {os.getloadavg()[0]:.2f}\n")
    for title, key in (
        ("kill", lambda one: one.blow.kind),
        ("when", lambda one: one.blow.state),
        ("ranks", lambda one: f"{line_of[one.index].size} ranks"),
        ("world", lambda one: line_of[one.index].world),
        ("healed by", lambda one: one.rungs[0] if one.rungs else "nothing, or another engine"),
        ("standby line", lambda one: "with" if line_of[one.index].has_standby else "without"),
    ):
        click.echo(table(rounds, key, title) + "\n")
    click.echo(f"healed by: {rungs(rounds)}")
    wrong = [one for one in rounds if one.violations]
    for one in wrong:
        click.echo(f"{one.index} ({line_of[one.index].world}) {one.blow}: {'; '.join(one.violations)}")
    click.echo(f"violations: {sum(len(one.violations) for one in wrong)} in {len(wrong)} rounds")
    return not wrong and len(rounds) == count and num_happened > 0


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(word) for word in text.split(",") if word.isdigit())
    if not set(sizes) <= set(WORLDS) or not sizes:
        raise click.BadParameter(f"some of {', '.join(map(str, WORLDS))}")
    return sizes


def _kinds(text: str) -> tuple[BlowKind, ...]:
    found = tuple(kind for kind in BLOW_KINDS if kind in text.split(","))
    if len(found) != len(text.split(",")):
        raise click.BadParameter(f"some of {', '.join(BLOW_KINDS)}")
    return found


@click.command()
@click.option("--count", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--lanes", type=click.IntRange(1, 64), default=4, show_default=True, help="Engines at a time.")
@click.option(
    "--sizes", default="2,4,8", show_default=True, callback=lambda *given: _sizes(given[-1]), help="In ranks."
)
@click.option(
    "--kinds", default=",".join(KINDS), show_default=True, callback=lambda *given: _kinds(given[-1]), help="Of blows."
)
@click.option("--output", type=click.Path(path_type=Path), help="A line of JSON for each kill; what is there is kept.")
@click.option("--only", type=click.IntRange(0), help="This one alone, with what its engine says.")
@click.option("--models", type=click.Path(path_type=Path), hidden=True)
@click.option("--job", type=int, hidden=True)
@click.option("--indices", hidden=True)
@click.option("--parent", type=int, hidden=True)
def main(
    count: int,
    seed: int,
    lanes: int,
    sizes: tuple[int, ...],
    kinds: tuple[BlowKind, ...],
    output: Path | None,
    only: int | None,
    models: Path | None,
    job: int | None,
    indices: str | None,
    parent: int | None,
) -> None:
    """Kill what serves, and see that nobody who is served notices."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are ended on the way out
    if job is not None:
        assert models is not None and output is not None and indices is not None and parent is not None
        die_with_parent(parent)
        (todo,) = jobs(seed, [int(index) for index in indices.split(",")], sizes)
        file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        asyncio.run(carry_out(todo, seed, kinds, models, file, None))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        write_checkpoint(models / "llama")
        write_checkpoint(models / "qwen3_moe", "qwen3_moe", num_experts=8)
        output = output or Path(folder) / "kills.jsonl"
        if only is not None:
            (todo,) = jobs(seed, [only], sizes)
            file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            asyncio.run(carry_out(todo, seed, kinds, models, file, Path("/dev/stderr")))
            sys.exit(not report([line for line in read_lines(output) if line.round.index == only], 1))
        done = {line.round.index for line in read_lines(output)}
        missing = [index for index in range(count) if index not in done]
        options = ["--seed", seed, "--sizes", ",".join(map(str, sizes)), "--kinds", ",".join(kinds)]
        options += ["--models", models, "--output", output]
        run(jobs(seed, missing, sizes), Lanes(options, Path(folder)), lanes, output, count)
        sys.exit(not report([line for line in read_lines(output) if line.round.index < count], count))


if __name__ == "__main__":
    main()
