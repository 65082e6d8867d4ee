"""One fault in one run of a real engine: start it, give it work, do the harm, and see what the ledger says."""

from __future__ import annotations

import logging
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.engine.brain import Brain
from phalanx.errors import DivergedError, PeerDiedError, PhalanxError, StartError, WorkerError
from phalanx.executor.cause import CONSEQUENCES
from phalanx.executor.executor import Executor
from phalanx.executor.line_plan import Capacity
from phalanx.executor.start import start_executor
from phalanx.ledger.verdict import Verdict
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import Ping
from phalanx.testing import memory_limit
from phalanx.testing.faults import Fault, Injected
from phalanx.testing.harm import InjectedError, hung_stores
from phalanx.testing.oracle import NOTHING, Rightness, assess, assess_failure
from phalanx.testing.warm_launcher import WarmStart

WARM_UP_TOKENS = 8
"""Steps by which the ledger gets to know how long one takes."""

SETTLE_S = 0.3
"""A rank that is hurt while idle is so for this long before it gets work."""

START_SPREAD_S = 0.1
"""A rank is hurt so long after its birth at most."""

LAST_VERDICT_S = 1.0
"""For a verdict to come after an error that is not the injected one."""

INJECTED = InjectedError.__name__

LOOK_S = 0.002

_lines = msgspec.json.Decoder(Injected)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one fault. Times in seconds."""

    fault: Fault
    injected: Injected | None
    """None if it never happened."""
    verdict: Verdict | None
    """The first one."""
    error: str
    """How the run ended; empty if it did not."""
    told_after_s: float | None
    """From the harm, or from the first work after it if the rank was idle, to the verdict, or, if there is none, to the
    error that names a rank."""
    rightness: Rightness
    took_s: float
    step_s: float | None = None
    """What a step took before the fault: the median of those with one token of each request. None if none was made."""


def try_fault(config: Config, fault: Fault, warm: WarmStart, *, patience_s: float = 20.0, seed: int = 0) -> Outcome:
    """Start an engine, have it serve, and let the fault happen to it. Waits `patience_s` at most for a verdict.

    `config` has `allow_chaos` and the ledger. Blocks until the engine has ended. Raises what keeps it from starting,
    but for faults of the start.
    """
    began_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phalanx-chaos-") as folder, _listening() as verdicts:
        trial = _Trial(fault, Path(folder) / "injected", verdicts, warm, patience_s, random.Random(seed))
        error = trial.run(config)
        memory_limit.remove_groups()
        return trial.outcome(error, time.monotonic() - began_at)


class _Verdicts(logging.Handler):
    """Those that the ledger logs, with the time of each."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, Verdict]] = []
        self.changed = threading.Condition()
        self._is_closed = False

    def close(self) -> None:
        """Take in no more."""
        self._is_closed = True
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        verdict = record.args[0] if isinstance(record.args, tuple) and record.args else None
        if isinstance(verdict, Verdict) and not self._is_closed:
            with self.changed:
                self.told.append((time.monotonic_ns(), verdict))
                self.changed.notify_all()


@contextmanager
def _listening() -> Iterator[_Verdicts]:
    handler, log = _Verdicts(), logging.getLogger("phalanx.ledger")
    log.addHandler(handler)
    try:
        yield handler
    finally:
        log.removeHandler(handler)


class _Trial:
    """One run."""

    def __init__(
        self,
        fault: Fault,
        report: Path,
        verdicts: _Verdicts,
        warm: WarmStart,
        patience_s: float,
        dice: random.Random,
    ) -> None:
        self._fault = fault
        self._report = report
        self._verdicts = verdicts
        self._warm = warm
        self._patience_s = patience_s
        self._dice = dice
        self._next_id = 0
        self._work_at_ns = 0
        self._failed_at_ns = 0
        self._is_over = threading.Event()
        self._was_killed_by_us = False
        self._step_s: float | None = None

    def run(self, config: Config) -> PhalanxError | None:
        """How it ended."""
        if self._fault.state == "start":
            return self._hurt_start(config)
        executor, capacity = self._start(config)
        with executor:
            try:
                self._serve(config, executor, capacity)
            except PhalanxError as error:
                self._failed_at_ns = time.monotonic_ns()
                self._await_verdict(0.0 if INJECTED in str(error) else LAST_VERDICT_S)
                return error
        return None

    def outcome(self, error: PhalanxError | None, took_s: float) -> Outcome:
        """To be called after the run."""
        injected = self._injected()
        first, last = (injected[0], injected[-1]) if injected else (None, None)
        told = self._verdicts.told
        verdict = told[0][1] if told else None
        told_after_s, rightness = None, NOTHING
        if first is not None and verdict is not None:
            rightness = assess(self._fault, last, verdict)
            told_after_s = self._since(first, told[0][0])
        elif first is not None and isinstance(error, DivergedError):
            rightness = assess(self._fault, last, _as_verdict(error))
            told_after_s = self._since(first, self._failed_at_ns)
        elif first is not None and error is not None and not self._was_killed_by_us:
            rank = _named_rank(error)
            is_its_own = isinstance(error, WorkerError) and error.kind not in CONSEQUENCES
            rightness = assess_failure(self._fault, rank, is_its_own=is_its_own)
            told_after_s = self._since(first, self._failed_at_ns) if rank is not None else None
        return Outcome(
            fault=self._fault,
            injected=None if first is None or last is None else msgspec.structs.replace(last, at_ns=first.at_ns),
            verdict=verdict,
            error=str(error or ""),
            told_after_s=told_after_s,
            rightness=rightness,
            took_s=took_s,
            step_s=self._step_s,
        )

    def _since(self, injected: Injected, told_ns: int) -> float:
        """Harm to an idle rank hurts nobody before there is work; but whoever tells it earlier tells it early."""
        began_ns = self._work_at_ns if injected.at_ns < self._work_at_ns < told_ns else injected.at_ns
        return (told_ns - began_ns) / 1e9

    def _start(self, config: Config) -> tuple[Executor, Capacity]:
        return start_executor(config, resolve(config.model.model), lambda _: None, new_launcher=self._warm.launcher)

    def _serve(self, config: Config, executor: Executor, capacity: Capacity) -> None:
        brain = Brain(
            config,
            executor,
            num_blocks=capacity.num_blocks,
            max_model_len=capacity.max_model_len,
            eos_token_ids=(),
            balancing=Balancing(config, executor) if config.parallel.enable_eplb else None,
        )
        self._submit(brain, config.parallel.data_parallel_size, 4, WARM_UP_TOKENS)
        self._warm_up(brain)
        executor.collective_rpc("arm_fault", (self._fault, str(self._report)))
        watch = threading.Thread(target=self._watch, name="phalanx-chaos")
        watch.start()
        try:
            self._work(brain, executor, config.parallel.data_parallel_size)
        finally:
            self._is_over.set()
            watch.join()

    def _warm_up(self, brain: Brain) -> None:
        took_s = []
        while brain.has_work():
            began_at = time.monotonic()
            brain.step()
            took_s.append(time.monotonic() - began_at)
        self._step_s = statistics.median(took_s)

    def _work(self, brain: Brain, executor: Executor, num_replicas: int) -> None:
        """Give the ranks work until it has happened and its consequences are there, or until there are none."""
        if self._fault.state == "idle":
            self._idle(executor)
        self._work_at_ns = time.monotonic_ns()
        expires_at = time.monotonic() + self._patience_s
        while time.monotonic() < expires_at:
            self._submit(brain, num_replicas, self._dice.randint(2, 60), self._dice.randint(2, 12))
            while brain.has_work():
                brain.step()
            if self._is_long_over():
                return

    def _is_long_over(self) -> bool:
        injected = self._injected()
        return bool(injected) and (time.monotonic_ns() - injected[0].at_ns) / 1e9 > self._fault.seconds + SETTLE_S

    def _idle(self, executor: Executor) -> None:
        """Until it has happened, and a while more; as an idle engine does, look after the ranks meanwhile."""
        heartbeat = executor.submit(Ping(), deadline_s=self._patience_s)
        until = time.monotonic() + SETTLE_S + self._dice.random() * SETTLE_S
        while time.monotonic() < until or not self._injected():
            if heartbeat.done():
                heartbeat = executor.submit(Ping(), deadline_s=self._patience_s)
            time.sleep(0.02)

    def _submit(self, brain: Brain, num_replicas: int, num_prompt: int, num_tokens: int) -> None:
        for _ in range(num_replicas):
            prompt = ints([self._dice.randrange(200) for _ in range(num_prompt)])
            brain.submit(Submit(self._next_id, prompt, SamplingParams(temperature=0, max_tokens=num_tokens)))
            self._next_id += 1

    def _watch(self) -> None:
        """End a run that has been judged, or that nobody judges, so that the brain does not wait for its deadline."""
        expires_at = None
        while not self._is_over.wait(LOOK_S if expires_at is None else 0.01):
            if expires_at is None and self._report.exists() and self._injected():
                expires_at = time.monotonic() + self._patience_s
            if self._verdicts.told or (expires_at is not None and time.monotonic() > expires_at):
                self._verdicts.close()  # what is told from now on is our doing
                self._was_killed_by_us = not self._verdicts.told
                self._warm.kill()
                return

    def _await_verdict(self, timeout_s: float) -> None:
        with self._verdicts.changed:
            self._verdicts.changed.wait_for(lambda: bool(self._verdicts.told), timeout_s)

    def _hurt_start(self, config: Config) -> PhalanxError | None:
        harm_it = self._hang_stores if self._fault.kind == "store" else self._hurt_newborn
        hurt = threading.Thread(target=harm_it, name="phalanx-chaos")
        hurt.start()
        try:
            executor, _ = self._start(config)
        except PhalanxError as error:
            self._failed_at_ns = time.monotonic_ns()
            return error
        finally:
            self._is_over.set()
            hurt.join()
        if not self._verdicts.told:
            self._report.unlink(missing_ok=True)  # it came too late
        executor.close()
        return None

    def _hurt_newborn(self) -> None:
        expires_at = time.monotonic() + self._patience_s
        while (pid := self._warm.pid(self._fault.rank)) is None and time.monotonic() < expires_at:
            time.sleep(LOOK_S)
        if pid is None:
            return
        time.sleep(self._dice.random() * START_SPREAD_S)
        self._report.write_bytes(msgspec.json.encode(Injected(at_ns=time.monotonic_ns())) + b"\n")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if self._fault.kind == "kill" else signal.SIGSTOP)

    def _hang_stores(self) -> None:
        """From when there is one, until that has been judged."""
        while not self._is_over.is_set():
            with hung_stores() as num_stores:
                if num_stores:
                    self._report.write_bytes(msgspec.json.encode(Injected(at_ns=time.monotonic_ns())) + b"\n")
                    expires_at = time.monotonic() + self._fault.seconds
                    while not (self._verdicts.told or self._is_over.wait(LOOK_S) or time.monotonic() > expires_at):
                        pass
                    return
            time.sleep(LOOK_S)

    def _injected(self) -> list[Injected]:
        with suppress(FileNotFoundError):
            return [_lines.decode(line) for line in self._report.read_bytes().splitlines()]
        return []


def _as_verdict(error: DivergedError) -> Verdict:
    """Of the comparison after each step, where nobody had to wait."""
    return Verdict(
        cause="diverged",
        culprits=error.ranks,
        nodes=("",) * len(error.ranks),
        what=str(error),
        step=error.step,
        group=error.group,
    )


def _named_rank(error: PhalanxError) -> int | None:
    """Whom an error blames, as far as it says so by its type."""
    return error.rank if isinstance(error, WorkerError | PeerDiedError | StartError) else None


def settings_for_chaos(**settings: Any) -> dict[str, Any]:
    """Settings of an engine of which one run is a matter of seconds."""
    return {
        "launcher": "local",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 128,
        "kv_cache_memory": 1 << 20,
        "max_num_seqs": 4,
        "threads_per_rank": 1,
        "ledger": True,
        "allow_chaos": True,
        **settings,
    }
