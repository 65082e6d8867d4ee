"""A thousand kills of engines that serve: whether every stream is that of a run without one, and how long it paused.

    python benchmarks/kills.py [--count 1000] [--lanes 4] [--seed 1] [--sizes 2,4,8] [--over local,served,ray,hosts]
                               [--output kills.jsonl]

Over 2, 4 and 8 processes, dense and mixture, tensor, pipeline and expert parallel, over shared memory or Gloo, with a
standby line and without; as processes of this host, and as actors of Ray: on two hosts made of namespaces, where those
can be (root, `ip`), and on a Ray of this host. Killed is a rank, by a signal or by the kernel for lack of memory, or
one that stands ready, both at once, the process that all ranks come from, one rank and then another one while the next
ones take over, a rank during a reload or a resize, the ledger's watchers, the process that holds a node's memory, the
engine's process; at any moment, or in a prompt's step, a decode step, or while idle. Meanwhile there are streams of
different kinds, and after each kill it is checked that each ended once and is the same to the last token, that the
right rank was blamed, that nothing is left over and that no wait passed its deadline (phalanx.testing.checker). A
server that is killed cannot answer: then streams have to end with an error at once, nothing may be left, and the next
server serves (phalanx.testing.serving).

An engine has twenty of them, in a process of its own; so many lanes run at a time. Kill i of a seed is always the same
with the same options and as many cores: `--only 17` repeats one, and shows what its engine says. What an output file
has already is not done again. Tables at the end; the exit code is 1 if anything did not hold, or was not run. Pauses
are of use only from a machine with a core for each rank of all lanes: two lanes with 8 ranks and a standby line each
are busy with 16 cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import click
import msgspec
from faults import WORLDS as WORLDS_OF_FAULTS
from faults import World
from nodes import Orders, RayHosts, why_no_hosts

from phalanx.config import Config
from phalanx.executor.shared_fate import die_with_parent
from phalanx.testing.blows import BLOW_KINDS, ENDS, Blow, BlowKind, Moment, blow_of_seed
from phalanx.testing.chaos import settings_for_chaos
from phalanx.testing.checker import Checker, Round
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.faults import World as RankWorld
from phalanx.testing.reach import Reach
from phalanx.testing.rounds import kills_table, rungs, table
from phalanx.testing.serving import ServedChecker
from phalanx.testing.strike import why_no_way_back

Over = Literal["local", "served", "ray", "hosts"]
"""served: `phalanx serve`, which is killed. ray: one node. hosts: two nodes with a network each."""

KINDS: tuple[BlowKind, ...] = ("kill", "oom", *ENDS)
_EXPERTS: dict[str, Any] = {"enable_expert_parallel": True}
WORLDS: dict[int, tuple[World, ...]] = {
    2: WORLDS_OF_FAULTS[2],
    4: WORLDS_OF_FAULTS[4],
    8: (
        World("tp8", "llama", {"tensor_parallel_size": 8}),
        World("dp2 tp4 experts", "qwen3_moe", {"data_parallel_size": 2, "tensor_parallel_size": 4, **_EXPERTS}),
        *WORLDS_OF_FAULTS[8],
    ),
}
OF_RAY: dict[int, tuple[World, ...]] = {
    2: (
        World("pp2", "llama", {"pipeline_parallel_size": 2}),
        World("dp2 experts", "qwen3_moe", {"data_parallel_size": 2, **_EXPERTS}),
    ),
    4: (
        World("tp2 pp2", "llama", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        World("dp2 tp2 experts", "qwen3_moe", {"data_parallel_size": 2, "tensor_parallel_size": 2, **_EXPERTS}),
    ),
    8: (
        World("tp4 pp2", "llama", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}),
        World("dp2 tp4 experts", "qwen3_moe", {"data_parallel_size": 2, "tensor_parallel_size": 4, **_EXPERTS}),
    ),
}
"""Such as fit two nodes: the ranks of a tensor-parallel group stay on one."""
SHARES: tuple[tuple[Over, int], ...] = (("local", 7), ("served", 1), ("ray", 1), ("hosts", 1))
"""Engines of each kind, in turn."""
CANNOT_BE: dict[Over, tuple[BlowKind, ...]] = {"ray": ("oom", "kill-lines"), "hosts": ("oom",)}
"""Actors are told nothing from outside; and on one host what all lines come from is Ray itself."""
ROUNDS_PER_ENGINE = 20
NUM_STREAMS = 8
SHAPE: dict[str, Any] = {"num_key_value_heads": 8}
"""Each of eight ranks has one."""
ROUND_S = 90.0
"""What a round may take, of all of a job: one that takes longer is ended."""
LATEST = 0.8
"""Of what comes of all streams, a server is killed after so much at the latest."""
ENGINE_KILLED_EVERY = 10
"""Rounds: an engine that ends again and again waits longer and longer before it is started again."""
START_S = 120.0
END_S = 30.0
LOOK_S = 0.2


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One round in the output file."""

    world: str
    family: str
    over: Over
    size: int
    has_standby: bool
    round: Round


class Job(NamedTuple):
    """What one engine is for."""

    number: int
    indices: Sequence[int]
    over: Over
    world: World
    size: int
    has_standby: bool


def jobs(seed: int, wanted: Sequence[int], sizes: Sequence[int], over: Sequence[Over]) -> list[Job]:
    """Each kind of engine takes its worlds in turn, in an order of the seed. The slowest come first."""
    by_number: dict[int, list[int]] = {}
    for index in wanted:
        by_number.setdefault(index // ROUNDS_PER_ENGINE, []).append(index)
    turns = [one for one, share in SHARES if one in over for _ in range(share)]
    found = []
    for number, indices in by_number.items():
        times, place = divmod(number, len(turns))
        where = turns[place]
        engines = _engines(seed, where, sizes)
        size, world, has_standby = engines[(times * turns.count(where) + turns[:place].count(where)) % len(engines)]
        found.append(Job(number, indices, where, world, size, has_standby))
    return sorted(found, key=lambda job: (job.over == "local", job.number))


def _engines(seed: int, over: Over, sizes: Sequence[int]) -> list[tuple[int, World, bool]]:
    """All that there may be: size, world, and whether it has a standby line. With Ray there is none."""
    is_ray = over in ("ray", "hosts")
    worlds = OF_RAY if is_ray else WORLDS
    found = [
        (size, world, standby) for size in sizes for world in worlds[size] for standby in (False, True)[: 2 - is_ray]
    ]
    random.Random(f"{seed} {over}").shuffle(found)
    return found


def settings_of(job: Job) -> dict[str, Any]:
    return {
        **settings_for_chaos(),
        "max_num_seqs": NUM_STREAMS,
        "max_model_len": 256,
        "kv_cache_memory": 4 << 20,
        "standby": int(job.has_standby),
        "engine_restarts": 100,
        **job.world.settings,
        **({"launcher": "ray"} if job.over in ("ray", "hosts") else {}),
        **({"ray_address": "local"} if job.over == "ray" else {}),
    }


def blow_of(job: Job, index: int, seed: int, kinds: Sequence[BlowKind], world: RankWorld) -> Blow:
    """The engine's process has rounds of its own, if it has any, since those take longest."""
    if job.over == "served":
        return Blow(kind="kill-server", rank=0, after=random.Random(f"{seed} {index}").uniform(0.0, LATEST))
    others = tuple(kind for kind in kinds if kind not in {"kill-engine", *CANNOT_BE.get(job.over, ())})
    if not others or (len(others) < len(kinds) and index % ENGINE_KILLED_EVERY == ENGINE_KILLED_EVERY - 1):
        return blow_of_seed(seed, index, world, has_standby=job.has_standby, kinds=("kill-engine",))
    states: tuple[Moment, ...] = (
        ("any", "idle") if job.over in ("ray", "hosts") else ("any", "idle", "prefill", "decode")
    )
    if "kill" in others and index % 2:  # at a moment of its own: as many as of all others
        others = ("kill",)
    return blow_of_seed(seed, index, world, has_standby=job.has_standby, kinds=others, states=states)


async def carry_out(
    job: Job, seed: int, kinds: Sequence[BlowKind], models: Path, file: int, log: Path | None, reach: Reach | None
) -> None:
    """One round after the other, each a line of the file; a new engine after one that is dead."""
    settings, model, left = settings_of(job), models / job.world.family, list(job.indices)
    config = Config.build(model=str(model), **settings)
    world = RankWorld.of(config)
    can_come_back = why_no_way_back(config) is None
    world = world._replace(has_agents=job.over == "hosts", can_shrink=world.can_shrink and can_come_back)
    while left:
        checker: Checker | ServedChecker
        if job.over == "served":
            checker = await ServedChecker.start(
                model, settings, num_streams=NUM_STREAMS, seed=seed + job.number, log=log
            )
        else:
            checker = await Checker.start(config, num_streams=NUM_STREAMS, seed=seed + job.number, log=log, reach=reach)
        try:
            while left and checker.is_alive:
                index = left.pop(0)
                found = await checker.round(index, blow_of(job, index, seed, kinds, world))
                if not left or not checker.is_alive:
                    remains = await checker.close()
                    found = msgspec.structs.replace(
                        found, violations=(*found.violations, *remains), num_left=found.num_left + len(remains)
                    )
                line = Line(
                    world=job.world.name,
                    family=job.world.family,
                    over=job.over,
                    size=job.size,
                    has_standby=job.has_standby,
                    round=found,
                )
                os.write(file, msgspec.json.encode(line) + b"\n")
        finally:
            await checker.close()


def do(job: Job, seed: int, kinds: Sequence[BlowKind], models: Path, output: Path, log: Path | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    orders = Orders() if job.over == "hosts" else None
    asyncio.run(carry_out(job, seed, kinds, models, file, log, orders))


def do_on_hosts(job: Job, options: Sequence[str], visible: Sequence[Path]) -> None:
    """Have a process on the first of two hosts do it, which asks this one to kill what is on them."""
    with RayHosts.made(job.size // 2, visible) as hosts:
        code = hosts.run([sys.executable, __file__, *options, "--inside"])
        if code or (left := hosts.leftovers()):
            raise click.ClickException(f"it ended with {code}" if code else f"left over: {left}")


def read_lines(output: Path) -> list[Line]:
    if not output.exists():
        return []
    found = [msgspec.json.decode(line, type=Line) for line in output.read_bytes().splitlines()]
    return sorted({line.round.index: line for line in found}.values(), key=lambda line: line.round.index)


class Lanes:
    """Processes that each carry out a job, so many at a time."""

    def __init__(self, options: Sequence[object], folder: Path, *, is_heard: bool) -> None:
        self._options = [*map(str, options)]
        self._folder = folder
        self._is_heard = is_heard
        """What engines say goes to stderr, and not to a file."""
        self._running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
        self.num_left = 0
        """Files that jobs have left behind."""

    def begin(self, job: Job) -> None:
        options = ["--job", job.number, "--indices", ",".join(map(str, job.indices)), "--parent", os.getpid()]
        own = self._folder / f"tmp-{job.number}"
        own.mkdir(exist_ok=True)
        # Ray's sockets are there, whose names may not be long.
        environment = {**os.environ, **({"TMPDIR": str(own)} if job.over in ("local", "served") else {})}
        with self._log(job).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, *self._options, *map(str, options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if self._is_heard else log,
                env=environment,
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
                elif left := sorted(path.name for path in (self._folder / f"tmp-{job.number}").iterdir()):
                    self.num_left += len(left)
                    click.echo(f"job {job.number} ({job.world.name}) has left files: {left}", err=True)
        return len(self._running)

    def end(self) -> None:
        for process in self._running:
            process.terminate()
        expires_at = time.monotonic() + END_S
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(expires_at - time.monotonic(), 0.0))
            process.kill()
            process.wait()

    def _log(self, job: Job) -> Path:
        return self._folder / f"job-{job.number}"


def run(wanted: list[Job], lanes: Lanes, num_lanes: int, output: Path, count: int, within_s: float) -> None:
    waiting, began_at, num_before = list(wanted), time.monotonic(), len(read_lines(output))
    try:
        while ((num_running := lanes.look()) or waiting) and time.monotonic() - began_at < within_s:
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
    click.echo(f" times in ms; load {os.getloadavg()[0]:.2f}\n")
    pairs = [(one, line_of[one.index].has_standby) for one in rounds]
    click.echo(kills_table(pairs, lambda one: (one.blow.kind, _where(line_of[one.index])), ("kill", "where")) + "\n")
    click.echo(kills_table(pairs, lambda one: (one.blow.kind,), ("kill",)) + "\n")
    click.echo(kills_table(pairs, lambda one: (_whole(line_of[one.index]),), ("world",)) + "\n")
    click.echo(kills_table(pairs, lambda one: (one.blow.state,), ("when",)) + "\n")
    click.echo(table(rounds, lambda one: one.rungs[0] if one.rungs else "another engine", "healed by") + "\n")
    click.echo(f"healed by: {rungs(rounds)}")
    wrong = [one for one in rounds if one.violations]
    for one in wrong:
        click.echo(f"{one.index} ({line_of[one.index].world}) {one.blow}: {'; '.join(one.violations)}")
    click.echo(f"violations: {sum(len(one.violations) for one in wrong)} in {len(wrong)} rounds")
    return not wrong and len(rounds) == count and num_happened > 0


def _where(line: Line) -> str:
    kind = "mixture" if line.family == "qwen3_moe" else "dense"
    return f"{line.size} {kind}{_OVER[line.over]}"


def _whole(line: Line) -> str:
    return f"{line.size}: {line.world}{_OVER[line.over]}"


_OVER: dict[Over, str] = {"local": "", "served": ", served", "ray": ", Ray", "hosts": ", Ray on two hosts"}


def possible(over: Sequence[Over]) -> tuple[Over, ...]:
    """Without what cannot be here, which is told."""
    has_ray = importlib.util.find_spec("ray") is not None
    why_not: dict[Over, str | None] = {
        "ray": None if has_ray else "Ray is not installed",
        "hosts": why_no_hosts() if has_ray else "Ray is not installed",
    }
    for one in over:
        if (reason := why_not.get(one)) is not None:
            click.echo(f"nothing over {one}: {reason}")
    return tuple(one for one in over if why_not.get(one) is None)


def _over(text: str) -> tuple[Over, ...]:
    found: list[Over] = [one for one in get_args(Over) if one in text.split(",")]
    if len(found) != len(text.split(",")):
        raise click.BadParameter(f"some of {', '.join(get_args(Over))}")
    return tuple(found)


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
@click.option(
    "--over",
    default=",".join(get_args(Over)),
    show_default=True,
    callback=lambda *given: _over(given[-1]),
    help="What runs the ranks. What cannot be here is left out.",
)
@click.option("--output", type=click.Path(path_type=Path), help="A line of JSON for each kill; what is there is kept.")
@click.option("--within", "within_s", default=float("inf"), help="Seconds after which what still runs is ended.")
@click.option("--tables", is_flag=True, help="Run nothing: the tables of what the output file has.")
@click.option("--only", type=click.IntRange(0), help="This one alone, with what its engine says.")
@click.option("--models", type=click.Path(path_type=Path), hidden=True)
@click.option("--job", type=int, hidden=True)
@click.option("--indices", hidden=True)
@click.option("--parent", type=int, hidden=True)
@click.option("--inside", is_flag=True, hidden=True)
def main(
    count: int,
    seed: int,
    lanes: int,
    sizes: tuple[int, ...],
    kinds: tuple[BlowKind, ...],
    over: tuple[Over, ...],
    output: Path | None,
    within_s: float,
    tables: bool,
    only: int | None,
    models: Path | None,
    job: int | None,
    indices: str | None,
    parent: int | None,
    inside: bool,
) -> None:
    """Kill what serves, and see that nobody who is served notices."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that engines are ended on the way out
    if job is not None:
        assert models is not None and output is not None and indices is not None and parent is not None
        (todo,) = jobs(seed, [int(index) for index in indices.split(",")], sizes, over)
        if not inside:
            die_with_parent(parent)
        if todo.over == "hosts" and not inside:
            do_on_hosts(todo, sys.argv[1:], (models.parent, output.parent))
        else:
            do(todo, seed, kinds, models, output, Path("/dev/stderr"))
        return
    over = possible(over)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        write_checkpoint(models / "llama", **SHAPE)
        write_checkpoint(models / "qwen3_moe", "qwen3_moe", num_experts=8, **SHAPE)
        output = (output or Path(folder) / "kills.jsonl").absolute()
        options = ["--seed", seed, "--sizes", ",".join(map(str, sizes)), "--kinds", ",".join(kinds)]
        options += ["--over", ",".join(over), "--models", models, "--output", output]
        done = {line.round.index for line in read_lines(output)}
        wanted = [only] if only is not None else [index for index in range(count) if index not in done and not tables]
        its_lanes = Lanes(options, Path(folder), is_heard=only is not None)
        run(jobs(seed, wanted, sizes, over), its_lanes, lanes, output, count, within_s)
        found = [
            line
            for line in read_lines(output)
            if line.round.index == only or (only is None and line.round.index < count)
        ]
        sys.exit(not report(found, 1 if only is not None else count) or its_lanes.num_left > 0)


if __name__ == "__main__":
    main()
