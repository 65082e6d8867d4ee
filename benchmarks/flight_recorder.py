"""The same faults as the ledger sees them, as `phalanx trace` does afterwards, and as torchfrtrace does.

    python benchmarks/flight_recorder.py [--ranks 2 --ranks 4] [--fault skipped ...]

Each case is a real torch.distributed program over Gloo, of that many processes. It makes steps of five collectives with
PyTorch's Flight Recorder on, and notes them in our journals as well; in its fifth step one rank does something else. A
watcher says who it was, and when. A while later every process that is left writes what its Flight Recorder has, as c10d
does at a time-out (which nobody waits for here: Gloo's is 30 minutes, NCCL's 10), and both analysers get these files.

Gloo's files do not say who is in which group, without which torchfrtrace stops with a KeyError: so both get them with
that put in. Of two ranks that differ nobody can say which is wrong: naming both is `both`. Where a size does not fit,
Gloo aborts the process that receives too much, whoever's fault it is, and that one leaves no dump.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

# Threads that spin take the cores from the ranks; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from phalanx.collectives.descriptor import Descriptor, Operation, dtype_name
from phalanx.executor.watching import Watching
from phalanx.ledger.flight_recorder import PREFIX, ProcessGroup, read
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.watch_order import WatchedRank, WatchOrder
from phalanx.transport.shared_memory import SegmentHandle, SharedSegment

FAULTS = ("skipped", "extra", "swapped", "shape", "dtype", "late", "killed")
GROUP = "0:default_pg"
_STEPS = 8
_FAULTY_STEP = 5
_DUMPED_AFTER_S = 1.5
"""From the verdict on: long enough for whoever waits to have waited."""
_DEADLINE_S = 60.0
_DUMP_DEADLINE_S = 5.0

c10d: Any = _distributed_c10d


class Call(NamedTuple):
    """One collective of the program."""

    operation: Operation
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


STEP = (
    Call("all_reduce", (8, 64)),
    Call("all_gather", (8, 32)),
    Call("all_reduce", (8, 64)),
    Call("broadcast", (8,), torch.int64),
    Call("all_reduce", (8, 128)),
)


class Case(NamedTuple):
    fault: str
    size: int
    culprit: int


class Sync(NamedTuple):
    """Of the processes of one program: semaphores, which a process that dies waiting leaves as they are."""

    asked: Any
    """For dumps."""
    written: Any
    over: Any
    faulty_ns: Any
    """When the fault began."""


class Outcome(NamedTuple):
    """Ranks that were blamed, and how long that took, in seconds."""

    live: tuple[int, ...]
    live_s: float
    ours: tuple[int, ...]
    ours_s: float
    torch: tuple[int, ...]
    torch_s: float


@click.command()
@click.option("--ranks", "sizes", type=click.IntRange(2, 8), multiple=True, default=(2, 4), show_default=True)
@click.option("--fault", "faults", type=click.Choice(FAULTS), multiple=True, default=FAULTS, show_default=True)
def main(sizes: tuple[int, ...], faults: tuple[str, ...]) -> None:
    """Compare verdicts on the same faults."""
    logging.getLogger("phalanx.ledger").setLevel(logging.CRITICAL)  # what it says stands in the table
    click.echo(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    click.echo("fault    ranks culprit | ledger, live    | phalanx trace    | torchfrtrace")
    outcomes = []
    for case in (Case(fault, size, culprit) for fault in faults for size in sizes for culprit in (0, size - 1)):
        outcome = measure(case)
        outcomes.append((case, outcome))
        columns = ((outcome.live, outcome.live_s), (outcome.ours, outcome.ours_s), (outcome.torch, outcome.torch_s))
        cells = " | ".join(f"{judged(case, blamed):10} {took_s:5.2f} s" for blamed, took_s in columns)
        click.echo(f"{case.fault:8} {case.size:5} {case.culprit:7} | {cells}")
    for name, field in (("ledger, live", "live"), ("phalanx trace", "ours"), ("torchfrtrace", "torch")):
        answers = [judged(case, getattr(outcome, field)).split()[0] for case, outcome in outcomes]
        median_s = statistics.median(getattr(outcome, f"{field}_s") for _, outcome in outcomes)
        counts = ", ".join(f"{answers.count(kind)} {kind}" for kind in ("right", "both", "nobody", "WRONG"))
        click.echo(f"{name:14} {counts} of {len(answers)}; median {median_s:.2f} s")


def judged(case: Case, blamed: Sequence[int]) -> str:
    """How good an answer that is."""
    if tuple(blamed) == (case.culprit,):
        return "right"
    if not blamed:
        return "nobody"
    if case.culprit in blamed and case.size == 2:
        return "both"
    return f"WRONG {','.join(map(str, blamed))}"


def measure(case: Case) -> Outcome:
    """Run the program, and have everybody judge it."""
    with tempfile.TemporaryDirectory() as directory:
        live, live_s = record(case, Path(directory))
        name_members(Path(directory), case.size)
        ours, ours_s = timed(lambda: our_analysis(Path(directory)))
        blamed, torch_s = timed(lambda: torch_analysis(Path(directory)))
    return Outcome(live, live_s, ours, ours_s, blamed, torch_s)


def timed(judge: Callable[[], tuple[int, ...]]) -> tuple[tuple[int, ...], float]:
    began_at = time.monotonic()
    return judge(), time.monotonic() - began_at


def our_analysis(directory: Path) -> tuple[int, ...]:
    """By `phalanx trace`, as a command."""
    program = "import sys; from phalanx.cli.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "trace", str(directory), "--json"]
    verdict = msgspec.json.decode(subprocess.run(command, capture_output=True, check=False).stdout)["verdict"]
    return () if verdict is None else tuple(verdict["culprits"])


def torch_analysis(directory: Path) -> tuple[int, ...]:
    """By torchfrtrace, as a command: whom it names at the first collective that it complains of."""
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    said = done.stdout + done.stderr
    for line in said.splitlines():
        if "Culprit rank" in line:
            return tuple(sorted({int(rank) for rank in re.findall(r"Culprit rank (\d+)", line)}))
        if found := re.search(r"(?:missing ranks: |Missing dump files from ranks )\{([\d, ]+)\}", line):
            return tuple(sorted(map(int, found[1].split(","))))
    if done.returncode:
        raise click.ClickException(f"torchfrtrace failed: {said.splitlines()[-1]}")
    return ()


def name_members(directory: Path, size: int) -> None:
    """Put into Gloo's dumps who is in the group."""
    group = ProcessGroup("0", "default_pg", str(list(range(size))))
    for rank, recording in read(directory).ranks.items():
        whole = msgspec.structs.replace(recording, pg_config={"0": group})
        (directory / f"{PREFIX}{rank}").write_bytes(pickle.dumps(msgspec.to_builtins(whole), protocol=2))


def record(case: Case, directory: Path) -> tuple[tuple[int, ...], float]:
    """Run the program, and have its Flight Recorders' dumps in `directory`: the live verdict, and its latency."""
    processes = multiprocessing.get_context("fork")
    asked, written, over = (processes.Semaphore(0) for _ in range(3))
    sync = Sync(asked, written, over, processes.Value("q", 0))
    with ExitStack() as stack, tempfile.NamedTemporaryFile() as store:
        journals = [stack.enter_context(SharedSegment.create(JOURNAL_BYTES, "journal")) for _ in range(case.size)]
        crew = [
            processes.Process(target=_rank, args=(case, rank, store.name, journal, directory, sync))
            for rank, journal in enumerate(journals)
        ]
        for process in crew:
            process.start()
            stack.callback(process.kill)
        watching = Watching(_order(case, [journal.handle for journal in journals]), on_hopeless=lambda: None)
        stack.callback(watching.close)
        verdict = watching.await_verdict(_DEADLINE_S)
        told_ns = time.monotonic_ns()
        time.sleep(_DUMPED_AFTER_S)
        for _ in crew:
            sync.asked.release()
        for _ in [process for process in crew if process.is_alive()]:
            sync.written.acquire(timeout=_DUMP_DEADLINE_S)
        for _ in crew:
            sync.over.release()
        for process in crew:
            process.join(_DUMP_DEADLINE_S)
    culprits = () if verdict is None else verdict.culprits
    return culprits, (told_ns - sync.faulty_ns.value) / 1e9


def _order(case: Case, journals: Sequence[SegmentHandle]) -> WatchOrder:
    return WatchOrder(
        ranks=tuple(
            WatchedRank(rank=rank, node="here", groups=("", GROUP), journal=journal)
            for rank, journal in enumerate(journals)
        ),
        groups={GROUP: tuple(range(case.size))},
    )


def _rank(case: Case, rank: int, store: str, journal: SharedSegment, directory: Path, sync: Sync) -> None:
    """One process of the program. Ends when all dumps are written."""
    threading.Thread(target=_run, args=(case, rank, store, journal, sync.faulty_ns), daemon=True).start()
    sync.asked.acquire(timeout=_DEADLINE_S)
    (directory / f"{PREFIX}{rank}").write_bytes(c10d._dump_fr_trace())
    sync.written.release()
    sync.over.acquire(timeout=_DEADLINE_S)
    os._exit(0)


def _run(case: Case, rank: int, store: str, journal: SharedSegment, faulty_ns: Any) -> None:
    timeout = timedelta(seconds=_DEADLINE_S)
    dist.init_process_group(
        "gloo", store=c10d.FileStore(store, case.size), rank=rank, world_size=case.size, timeout=timeout
    )
    notes = Journal(journal.buf, epoch=0)
    group = group_notes(1, notes, None)
    for step in range(1, _STEPS + 1):
        notes.enter("stepping")
        begun = notes.begin_step(step, digest=1, num_tokens=8)
        for call in _calls(case, rank, step, faulty_ns):
            descriptor = Descriptor(call.operation, dtype_name(call.dtype), call.shape)
            group.explain(descriptor)
            group.issue(descriptor)
            try:
                _issue(call, case.size)
            except RuntimeError:  # Gloo has noticed that a peer is gone, or sends another size
                time.sleep(_DEADLINE_S)
            group.done()
        notes.leave_step()
        notes.done(begun)
        notes.enter("idle")
        time.sleep(0.01)


def _calls(case: Case, rank: int, step: int, faulty_ns: Any) -> Iterator[Call]:
    if rank != case.culprit or step != _FAULTY_STEP:
        yield from STEP
        return
    for index, call in enumerate(STEP):
        if index != 2:
            if not (case.fault == "swapped" and index == 3):
                yield call
            continue
        faulty_ns.value = time.monotonic_ns()
        yield from _faulty(case.fault, call, STEP[index + 1])


def _faulty(fault: str, call: Call, following: Call) -> Iterator[Call]:
    """What is done instead of `call`."""
    if fault == "late":
        time.sleep(_DEADLINE_S)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "extra":
        yield from (call, call)
    if fault == "swapped":
        yield from (following, call)
    if fault == "shape":
        yield call._replace(shape=(call.shape[0], call.shape[1] // 2))
    if fault == "dtype":
        yield call._replace(dtype=torch.float64)


def _issue(call: Call, size: int) -> None:
    x = torch.zeros(call.shape, dtype=call.dtype)
    if call.operation == "all_reduce":
        dist.all_reduce(x)
    elif call.operation == "broadcast":
        dist.broadcast(x, 0)
    else:
        assert call.operation == "all_gather"
        dist.all_gather([torch.empty_like(x) for _ in range(size)], x)


if __name__ == "__main__":
    main()
