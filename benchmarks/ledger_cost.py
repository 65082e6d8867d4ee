"""What the ledger costs: a record, the watcher, a served token; and beside PyTorch's own recorders.

    python benchmarks/ledger_cost.py [--model PATH | --shape qwen2.5-1.5b] [--device cpu] [--ranks 2] [--rounds 9]
        [--engines 2] [--texts 2] [--short]

- *Record*: microseconds of a collective (issue and end) and of a step, in Python alone.
- *Watcher*: share of a core that it takes while ranks are idle, and while each notes 64 collectives every 20 ms.
- *Tokens*: an engine (of a small random model unless --model or --shape names another) decodes for eight streams, and
  of three steps in a row its ranks note nothing in one; note it, for the ledger and for the guard's digests, in another
  one; and in the third one also have a watcher beside them that looks ten times as often as usual. What a look costs is
  too little to be seen beside how much steps differ: so it is told from what ten times as many cost, by the cores that
  these took and those that the engine's own watcher takes. The ratio of tokens per second as the median over the threes
  of steps, with the interval that it is in with 95 %.
- *All-reduce*: two ranks over Gloo, 4 KiB; a loop as it is, with every call in a journal, with PyTorch's Flight
  Recorder on, and with TORCH_DISTRIBUTED_DEBUG=DETAIL, which take turns; microseconds a call, and of the first.

With --device cuda tokens alone, in bfloat16 and without CUDA graphs, so that every collective is noted.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click
from large_checkpoint import SHAPES, write_large_checkpoint

from phalanx.collectives.descriptor import Descriptor
from phalanx.collectives.journaled import JournaledGroup
from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.executor.executor import Executor
from phalanx.executor.start import start_executor
from phalanx.executor.watching import Watching
from phalanx.ledger import confirmation, watcher
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.pulse import Pulse
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.ledger.watcher import watch
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment
from phalanx.worker.methods import remote_method
from phalanx.worker.worker import Worker

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")
COLLECTIVES_PER_STEP = 64
STEP_S = 0.02
TEXTS = 40
STREAMS, INPUT_LEN, OUTPUT_LEN = 8, 32, 192
FIRST_STEPS = 3
KV_CACHE_BYTES = 128 << 20  # all streams have room in it at once: steps are of eight tokens
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32"},
    "cuda": {"dtype": "bfloat16", "cuda_graphs": False},
}
MODEL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
CALLS, SIZE = 2000, 1024
DEADLINE_S = 120.0
OFTENER = 10
HOW_OFTEN = {
    confirmation: ("LOOK_S",),
    watcher: ("LONGEST_TRUST_S", "LONGEST_REST_S", "FULL_LOOK_S", "LEARN_S"),
}
STEPS_OF_WATCHER = 150


class Recorder(NamedTuple):
    """One way to know what ranks do."""

    name: str
    environment: dict[str, str]
    is_ours: bool = False


RECORDERS = (
    Recorder("none", {}),
    Recorder("ledger", {}, is_ours=True),
    Recorder("Flight Recorder", {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}),
    Recorder("DETAIL", {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}),
)


def cost_of(action: Callable[[], None], number: int = 20_000, rounds: int = 9) -> float:
    """Microseconds, the median of rounds."""
    took = []
    for _ in range(rounds):
        began_at = time.perf_counter()
        for _ in range(number):
            action()
        took.append((time.perf_counter() - began_at) / number * 1e6)
    return statistics.median(took)


def report_records() -> None:
    journal = Journal(memoryview(bytearray(JOURNAL_BYTES)), epoch=1)
    group, reduce = group_notes(1, journal, None), Descriptor("all_reduce", "float32", (8, 4096))

    def collective() -> None:
        group.issue(reduce)
        group.done()

    def step() -> None:
        journal.done(journal.begin_step(1, 7, 8))
        journal.leave_step()

    click.echo(f"record: a collective {cost_of(collective):.2f} µs, a step {cost_of(step):.2f} µs")


def note(handle: SegmentHandle, works: bool, ends: Connection) -> None:
    """One rank, which does nothing but note: until the other end says so."""
    with SharedSegment.attach(handle) as segment:
        journal = Journal(segment.buf, epoch=1)
        pulse = Pulse(segment.buf)
        group = group_notes(1, journal, None)
        collectives = [Descriptor("all_reduce", "float32", (8, 1 + size)) for size in range(TEXTS)]
        for collective in collectives:
            group.explain(collective)
        journal.enter("idle")
        step = 0
        while not ends.poll(STEP_S):
            if not works:
                continue
            step += 1
            journal.enter("stepping")
            number = journal.begin_step(step, 7, 8)
            for place in range(COLLECTIVES_PER_STEP):
                group.issue(collectives[place % TEXTS])
                group.done()
            journal.done(number)
            journal.enter("idle")
        journal.enter("leaving")
        pulse.close()


def cores_of_watcher(num_ranks: int, works: bool, for_s: float) -> float:
    """What share of a core it takes."""
    spawn = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        segments = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, f"{rank}")) for rank in range(num_ranks)]
        pipes = [spawn.Pipe() for _ in segments]
        ranks = [
            spawn.Process(target=note, args=(segment.handle, works, pipe[1]))
            for segment, pipe in zip(segments, pipes, strict=True)
        ]
        for rank in ranks:
            rank.start()
        order = WatchOrder(
            ranks=tuple(
                WatchedRank(rank=i, node="here", groups=("", "tp@0"), journal=segment.handle)
                for i, segment in enumerate(segments)
            ),
            groups={"tp@0": tuple(range(num_ranks))},
        )
        watching = Watching(order, lambda: None)
        stack.callback(watching.close)
        assert watching._process is not None
        time.sleep(1.0)  # it has started
        before = cpu_s(watching._process.pid)
        time.sleep(for_s)
        took = (cpu_s(watching._process.pid) - before) / for_s
        assert watching.verdict is None or not watching.verdict.is_final, watching.verdict
        for pipe in pipes:
            pipe[0].send(None)
        for rank in ranks:
            rank.join(DEADLINE_S)
    return took


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def report_watcher(num_ranks: int, for_s: float) -> None:
    idle, works = (cores_of_watcher(num_ranks, works, for_s) for works in (False, True))
    click.echo(f"watcher of {num_ranks} ranks: {idle:.4f} cores while they are idle, {works:.4f} while they decode")


def submit(brain: Brain, dice: random.Random) -> None:
    """All streams, and compute their prompts."""
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    for request_id in range(STREAMS):
        brain.submit(Submit(request_id, ints([dice.randrange(256) for _ in range(INPUT_LEN)]), sampling))
    for _ in range(FIRST_STEPS):
        brain.step()


def step_s(brain: Brain) -> float:
    began_at = time.perf_counter()
    brain.step()
    return time.perf_counter() - began_at


@contextmanager
def engine(model: Path, device: str, num_ranks: int) -> Iterator[tuple[Executor, Brain]]:
    config = Config.build(
        model=str(model),
        device=device,
        tensor_parallel_size=num_ranks,
        max_model_len=INPUT_LEN + OUTPUT_LEN,
        max_num_seqs=STREAMS,
        kv_cache_memory=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        threads_per_rank=1,
        async_scheduling=False,  # so that a step is one that is noted or one that is not
        worker_extension_cls=f"{Path(__file__).stem}:{Muting.__name__}",
        **SETTINGS[device],
    )
    executor, capacity = start_executor(config, resolve(str(model)), lambda *_: None)
    with executor:
        yield (
            executor,
            Brain(
                config,
                executor,
                num_blocks=capacity.num_blocks,
                max_model_len=capacity.max_model_len,
                eos_token_ids=(257,),
            ),
        )


class Muting:
    """A worker extension that has its rank note nothing for a while, as without a ledger and a guard: its groups are
    then the bare ones."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._kept = worker._notes._journal, worker._notes.digests

    @remote_method
    def have_noted(self, notes: bool) -> None:
        """From the next step on."""
        self._worker._notes._journal, self._worker._notes.digests = self._kept if notes else (None, None)
        for group in self._worker.groups.values():
            if isinstance(group, JournaledGroup):
                bare = {} if notes else {name: getattr(group._group, name) for name in OPERATIONS}
                for name in OPERATIONS:
                    group.__dict__.pop(name, None)
                group.__dict__.update(bare)


class Steps(NamedTuple):
    """Seconds of three steps in a row, as the benchmark's first lines say."""

    bare_s: float
    noted_s: float
    watched_s: float


class OfEngine(NamedTuple):
    """What one engine has taken."""

    steps: list[Steps]
    watcher_cores: float
    often_cores: float
    """Of the watcher that looks oftener, while it could."""

    def ratios(self) -> Iterator[tuple[float, float, float]]:
        """Of the tokens per second without, those with notes alone; of these, those with a watcher; with both."""
        for bare_s, noted_s, watched_s in self.steps:
            with_watcher_s = noted_s + (watched_s - noted_s) * self.watcher_cores / self.often_cores
            yield bare_s / noted_s, noted_s / with_watcher_s, bare_s / with_watcher_s


def report_tokens(
    model: Path | None, shape: str | None, device: str, num_ranks: int, num_engines: int, num_texts: int
) -> None:
    """Compare steps of one engine, each with its neighbours: two engines of the same settings differ by more than the
    ledger costs, as their memory lies elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            model = write_large_checkpoint(Path(folder), SHAPES[shape])
        model = model or write_checkpoint(Path(folder) / "model", **MODEL)
        engines = [threes_of_steps(model, device, num_ranks, num_texts) for _ in range(num_engines)]
    ratios = [each for one in engines for each in one.ratios()]
    rate = statistics.median(STREAMS / steps.bare_s for one in engines for steps in one.steps)
    click.echo(
        f"tokens/s over {num_ranks} ranks, of those without ledger and guard ({rate:.0f}), the median with its 95 % "
        f"interval, {len(ratios)} threes of steps of {num_engines} engines:"
    )
    for what, values in zip(("notes", "watcher, of these", "both"), zip(*ratios, strict=True), strict=True):
        least, most = interval_of_median(values)
        click.echo(f"  {what}: {statistics.median(values):.4f} ({least:.4f} to {most:.4f})")
    for one in engines:
        extra = statistics.median((steps.watched_s - steps.noted_s) / steps.watched_s for steps in one.steps)
        click.echo(
            f"  the watcher {one.watcher_cores:.4f} cores; one that looks {OFTENER} times as often "
            f"{one.often_cores:.4f}, and steps beside it are longer by {extra:.4f}"
        )


def threes_of_steps(model: Path, device: str, num_ranks: int, num_texts: int) -> OfEngine:
    """In any order, of a new engine. Its own watcher goes on only for as long as it is measured itself."""
    dice, found, often_cpu_s = random.Random(0), [], 0.0
    with engine(model, device, num_ranks) as (executor, brain):
        own = executor._watching
        assert own is not None and own._process is not None and isinstance(own.order, WatchOrder)
        submit(brain, dice)
        cores = cores_beside(brain, own._process.pid)
        with often_watched(own.order) as often:
            for _ in range(num_texts):
                while brain.has_work():
                    brain.step()
                submit(brain, dice)
                os.kill(own._process.pid, signal.SIGSTOP)
                while brain.has_work():
                    took_s = {}
                    for name in dice.sample(Steps._fields, 3):
                        executor.collective_rpc("have_noted", [name != "bare_s"])
                        before_s = cpu_s(often)
                        os.kill(often, signal.SIGCONT if name == "watched_s" else signal.SIGSTOP)
                        took_s[name] = step_s(brain)
                        os.kill(often, signal.SIGSTOP)
                        often_cpu_s += cpu_s(often) - before_s
                    found.append(Steps(**took_s))
                executor.collective_rpc("have_noted", [True])
                os.kill(own._process.pid, signal.SIGCONT)
    return OfEngine(found, cores, often_cpu_s / sum(steps.watched_s for steps in found))


def cores_beside(brain: Brain, pid: int) -> float:
    """What share of a core a process takes while ranks decode as usual."""
    before_s, began_at = cpu_s(pid), time.perf_counter()
    for _ in range(STEPS_OF_WATCHER):
        brain.step()
    return (cpu_s(pid) - before_s) / (time.perf_counter() - began_at)


@contextmanager
def often_watched(order: WatchOrder) -> Iterator[int]:
    """Another watcher of the same ranks, which looks oftener: its process, which is stopped at first."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=watch_often, args=(order, theirs))
    process.start()
    assert process.pid is not None
    try:
        if not ours.poll(DEADLINE_S):
            raise TimeoutError(f"no other watcher after {DEADLINE_S} s")
        os.kill(process.pid, signal.SIGSTOP)
        yield process.pid
    finally:
        process.kill()
        process.join(DEADLINE_S)


def watch_often(order: WatchOrder, begins: Connection) -> None:
    """What the engine's watcher does, and oftener. What it found would be seen among the errors."""
    for module, names in HOW_OFTEN.items():
        for name in names:
            setattr(module, name, getattr(module, name) / OFTENER)
    begins.send(None)
    watch(order, os.pipe()[0], sys.stderr.fileno())


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with a probability of 95 %, whatever the distribution: between two order statistics."""
    ordered, distance = sorted(values), 0.98 * math.sqrt(len(values))
    first = max(0, math.floor(len(values) / 2 - distance))
    return ordered[first], ordered[-1 - first]


def loop(rank: int, store: str, recorder: Recorder, turns: Connection) -> None:
    """One rank of an all-reduce: at each turn CALLS of them, and how long one took."""
    os.environ.update(recorder.environment)
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.ones(SIZE)
    notes = group_notes(1, Journal(memoryview(bytearray(JOURNAL_BYTES)), epoch=1), None)
    reduce = Descriptor("all_reduce", "float32", (SIZE,))
    while turns.recv():
        distributed.barrier()
        began_at = time.perf_counter()
        for _ in range(CALLS):
            if recorder.is_ours:
                notes.issue(reduce)
            distributed.all_reduce(x)
            if recorder.is_ours:
                notes.done()
            x.fill_(1.0)
        turns.send((time.perf_counter() - began_at) / CALLS * 1e6)
    distributed.destroy_process_group()


def report_all_reduce(rounds: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    took: dict[str, list[float]] = {recorder.name: [] for recorder in RECORDERS}
    with tempfile.TemporaryDirectory() as folder:
        turns: dict[str, list[Connection]] = {}
        processes = []
        for recorder in RECORDERS:
            pipes = [spawn.Pipe() for _ in range(2)]
            turns[recorder.name] = [pipe[0] for pipe in pipes]
            for rank, pipe in enumerate(pipes):
                store = f"{folder}/{recorder.name.replace(' ', '-')}"
                processes.append(spawn.Process(target=loop, args=(rank, store, recorder, pipe[1])))
                processes[-1].start()
        for round_number in range(rounds + 1):
            for name in sorted(turns, key=lambda name: random.Random(f"{round_number} {name}").random()):
                slowest = take_turn(turns[name])
                if round_number:
                    took[name].append(slowest)
        for ends in turns.values():
            for end in ends:
                end.send(False)
        for process in processes:
            process.join(DEADLINE_S)
    for name, of_rounds in took.items():
        ratio = statistics.median(one / none for one, none in zip(of_rounds, took["none"], strict=True))
        click.echo(f"all_reduce over Gloo, {name}: {statistics.median(of_rounds):.1f} µs, {ratio:.3f} of none")


def take_turn(ends: Sequence[Connection]) -> float:
    for end in ends:
        end.send(True)
    if not all(end.poll(DEADLINE_S) for end in ends):
        raise TimeoutError(f"no answer of a rank for {DEADLINE_S} s")
    return max(float(end.recv()) for end in ends)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="What the two engines run.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of --model.")
@click.option("--device", type=click.Choice(list(SETTINGS)), default="cpu", show_default=True)
@click.option("--ranks", default=2, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--engines", type=click.IntRange(1), default=2, show_default=True, help="One after the other.")
@click.option("--texts", type=click.IntRange(1), default=2, show_default=True, help="Of each engine.")
@click.option("--short", is_flag=True, help="Whether it runs at all.")
def main(
    model: Path | None,
    shape: str | None,
    device: str,
    ranks: int,
    rounds: int,
    engines: int,
    texts: int,
    short: bool,
) -> None:
    rounds, engines, texts = (3, 1, 1) if short else (rounds, engines, texts)
    if device == "cuda":
        report_tokens(model, shape, device, ranks, engines, texts)
        return
    report_records()
    for num_ranks in (ranks, 8):
        report_watcher(num_ranks, 1.0 if short else 10.0)
    report_tokens(model, shape, device, ranks, engines, texts)
    report_all_reduce(rounds)


if __name__ == "__main__":
    main()
