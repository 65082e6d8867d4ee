"""What `--collective-guard` costs: for each collective, each step, and in the brain.

    python benchmarks/guard.py [--short]

*A collective* is one call of a group of which nothing is left but what is noted around it. *The brain* is what it does
with the words of one step's ranks. *Agreeing* is what `strict` adds to an all-reduce of [1, 256] float32 between two
processes. *A step* is one token of one request, by ranks that share a small model over shared memory: the least that a
step can be. Engines with `off` (twice, to see what a difference is worth), `digest` and `strict` take turns after each
step, without async scheduling, so that those whose turn it is not sleep. All without the ledger, but where it is named.
Microseconds; medians (and the middle half) of rounds or steps, differences and ratios of those that came after each
other.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from phalanx.collectives.agreement import agreement
from phalanx.collectives.group import Group
from phalanx.collectives.join import join
from phalanx.collectives.journaled import JournaledGroup
from phalanx.collectives.rendezvous import open_rendezvous
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.executor.guarding import Guarding, with_boards
from phalanx.executor.start import start_executor
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.step_digests import BOARD_BYTES, StepDigests
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.transport.shared_memory import SharedSegment
from phalanx.worker.spec import WorkerSpec

Level = Literal["off", "digest", "strict"]
ENGINES: dict[str, Level] = {"off": "off", "off again": "off", "digest": "digest", "strict": "strict"}
NUM_LAYERS = 8
STEPS_PER_ROUND = 400
MODEL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": NUM_LAYERS}
COLLECTIVES_PER_STEP = 2 * NUM_LAYERS + 3

NUM_TURNS = 20
DEADLINE_S = 600.0


def best_us(*programs: Callable[[], object], num_calls: int) -> list[float]:
    """Of one call of each, among so many short turns that they take in turn: what else runs disturbs all alike."""
    best_s = [float("inf")] * len(programs)
    for _ in range(NUM_TURNS):
        for i, program in enumerate(programs):
            began_at = time.perf_counter()
            for _ in range(num_calls // NUM_TURNS):
                program()
            best_s[i] = min(best_s[i], time.perf_counter() - began_at)
    return [seconds / (num_calls // NUM_TURNS) * 1e6 for seconds in best_s]


class Calls:
    """The same call of a group, with more and more noted around it."""

    def __init__(self, stack: ExitStack) -> None:
        alone = SingleGroup(GroupSpec("alone", "single", (0,), FIRST_EPOCH, 1.0, 1.0))
        board = stack.enter_context(SharedSegment.create(BOARD_BYTES, "board")).buf
        journal = stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")).buf
        self._digests = StepDigests(board, 1)
        self._digests.begin(1)
        written = Journal(journal, FIRST_EPOCH)
        self._x = torch.zeros(1, 256)
        self._groups: dict[str, Group] = {
            "nothing": alone,
            "digest": JournaledGroup(alone, group_notes(1, None, self._digests)),
            "ledger": JournaledGroup(alone, group_notes(1, written, None)),
            "ledger and digest": JournaledGroup(alone, group_notes(1, written, self._digests)),
        }

    def round(self, num_calls: int) -> dict[str, float]:
        """Microseconds of a call, by what is noted."""
        calls = [self._call(group) for group in self._groups.values()]
        return dict(zip(self._groups, best_us(*calls, num_calls=num_calls), strict=True))

    def leave_us(self, num_calls: int) -> float:
        """Of beginning and leaving a step."""

        def turn() -> None:
            self._digests.begin(1)
            self._digests.leave()

        return best_us(turn, num_calls=num_calls)[0]

    def _call(self, group: Group) -> Callable[[], Tensor]:
        all_reduce, x = group.all_reduce, self._x
        return lambda: all_reduce(x)


class Compared:
    """The brain's part for a group of ranks, of which the first answers."""

    def __init__(self, num_ranks: int, stack: ExitStack) -> None:
        group = GroupSpec("tp", "shm", tuple(range(num_ranks)), FIRST_EPOCH, 1.0, 1.0)
        config = Config.build(model="m")
        specs = [
            WorkerSpec(
                rank=rank,
                local_rank=rank,
                ranks_on_host=num_ranks,
                device="cpu",
                config=config,
                checkpoint="m",
                epoch=FIRST_EPOCH,
                groups=(group,),
                queue=None,
            )
            for rank in group.ranks
        ]
        specs = with_boards(specs, group.ranks, stack)
        self._guarding = Guarding(specs, stack)
        boards = [SharedSegment.attach(spec.board).buf for spec in specs if spec.board is not None]
        for digests in (writers := [StepDigests(board, 1) for board in boards]):
            digests.begin(1)
        self._said, *_ = [digests.leave() for digests in writers]

    def round(self, num_calls: int) -> float:
        return best_us(lambda: self._guarding.take(0, self._said), num_calls=num_calls)[0]


class Engine:
    """Ranks under one level of guard."""

    def __init__(self, model: Path, level: Level, num_ranks: int, stack: ExitStack) -> None:
        config = Config.build(
            model=str(model),
            dtype="float32",
            device="cpu",
            tensor_parallel_size=num_ranks,
            max_model_len=512,
            max_num_seqs=4,
            kv_cache_memory=16 << 20,
            enable_prefix_caching=False,
            async_scheduling=False,
            threads_per_rank=1,
            collective_guard=level,
            ledger=False,
        )
        executor, capacity = start_executor(config, resolve(str(model)), lambda *_: None)
        stack.push(executor)
        self._brain = Brain(
            config, executor, num_blocks=capacity.num_blocks, max_model_len=capacity.max_model_len, eos_token_ids=()
        )

    def begin(self, num_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self._brain.submit(Submit(0, ints([1, 2, 3]), sampling))
        self.step_us()  # the prompt

    def step_us(self) -> float:
        began_at = time.perf_counter()
        batch = self._brain.step()
        assert batch is not None and batch.tokens
        return (time.perf_counter() - began_at) * 1e6


def be_rank(spec: GroupSpec, rank: int, rounds: int, num_calls: int, results: Connection) -> None:
    """One of two that sum up, in turn without and with an agreement. The first sends pairs of microseconds a call."""
    torch.set_num_threads(1)
    plain = join(spec, rank, torch.device("cpu"), None)
    agreed = JournaledGroup(plain, group_notes(1, None, None), agreement(spec, rank, None))
    x = torch.zeros(1, 256)
    groups: list[Group] = [plain, agreed]
    pairs = [best_us(*(partial(group.all_reduce, x) for group in groups), num_calls=num_calls) for _ in range(rounds)]
    if rank == 0:
        results.send(pairs)


def report_agreeing(rounds: int, num_calls: int) -> None:
    processes = multiprocessing.get_context("spawn")
    with open_rendezvous("tp", "shm", (0, 1), FIRST_EPOCH, 60.0, 60.0, agrees=True) as rendezvous:
        mine, theirs = processes.Pipe(duplex=False)
        ranks = [
            processes.Process(target=be_rank, args=(rendezvous.spec, rank, rounds, num_calls, theirs))
            for rank in rendezvous.spec.ranks
        ]
        for rank in ranks:
            rank.start()
        theirs.close()
        assert mine.poll(DEADLINE_S), "the ranks do not come to an end"
        pairs = mine.recv()
        for rank in ranks:
            rank.join()
    click.echo("agreeing, us an all-reduce of two ranks")
    click.echo(f"  {'off':20} {middle([off for off, _ in pairs])}")
    click.echo(f"  {'strict, more':20} {middle([strict - off for off, strict in pairs])}")


def middle(values: Sequence[float]) -> str:
    """The median, and where the middle half of the values is."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:8.3f} ({low:.3f} to {high:.3f})"


def report_calls(rounds: int, num_calls: int) -> None:
    with ExitStack() as stack:
        calls = Calls(stack)
        found = [calls.round(num_calls) for _ in range(rounds)]
        click.echo("a collective, us more than without")
        for name, without in (("digest", "nothing"), ("ledger", "nothing"), ("ledger and digest", "ledger")):
            click.echo(f"  {name:20} {middle([one[name] - one[without] for one in found])}")
        click.echo(f"  {'the step itself':20} {middle([calls.leave_us(num_calls) for _ in range(rounds)])}")
        click.echo("the brain, us a step")
        for num_ranks in (2, 4, 8):
            compared = Compared(num_ranks, stack)
            click.echo(f"  {f'{num_ranks} ranks':20} {middle([compared.round(num_calls) for _ in range(rounds)])}")


def report_steps(num_ranks: int, rounds: int) -> None:
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = write_checkpoint(where, **MODEL)
        engines = {name: Engine(model, level, num_ranks, stack) for name, level in ENGINES.items()}
        found: list[dict[str, float]] = []
        dice = random.Random(0)
        for _ in range(rounds):
            for engine in engines.values():
                engine.begin(STEPS_PER_ROUND + 1)
            for _ in range(STEPS_PER_ROUND):
                # One that steps twice in a row has its caches warm: that must not always be the same.
                order = dice.sample(list(engines), len(engines))
                found.append({name: engines[name].step_us() for name in order})
        click.echo(f"a step of {num_ranks} ranks, {COLLECTIVES_PER_STEP} collectives")
        click.echo(f"  {'off':20} {middle([one['off'] for one in found])}")
        for name in list(engines)[1:]:
            click.echo(f"  {name:20} {middle([one[name] for one in found])}")
            click.echo(f"  {name + ' to off':20} {middle([one[name] / one['off'] for one in found])}")
            each = [(one[name] - one["off"]) / COLLECTIVES_PER_STEP for one in found]
            click.echo(f"  {'a collective more':20} {middle(each)}")


@click.command()
@click.option("--ranks", "num_ranks", default=2, show_default=True, help="Tensor parallel ranks of a step.")
@click.option("--short", is_flag=True, help="Few rounds, to see that it works.")
def main(num_ranks: int, short: bool) -> None:
    """See the top of this file."""
    report_calls(rounds=3 if short else 15, num_calls=2_000 if short else 20_000)
    report_agreeing(rounds=3 if short else 15, num_calls=400 if short else 4_000)
    report_steps(num_ranks, rounds=1 if short else 6)


if __name__ == "__main__":
    main()
