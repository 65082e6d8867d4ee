"""A brain over a formation, with requests of different kinds, and the faults that befall it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.engine.brain import Brain
from phalanx.engine.succession import Succession
from phalanx.errors import PhalanxError
from phalanx.executor.local import LocalLauncher
from phalanx.membership.formation import start_formation
from phalanx.models.checkpoint import resolve
from phalanx.protocol.client import FormationStats, Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import Call, Step
from phalanx.testing.chaos import settings_for_chaos
from phalanx.testing.faults import Fault

READY_WITHIN_S = 60.0

PROMPTS = ((1, 2, 3, 4, 5, 6, 7), (11, 12), tuple(range(20, 60)))
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=7, max_tokens=30, ignore_eos=True, logprobs=1),
    SamplingParams(temperature=0.8, seed=8, max_tokens=20, ignore_eos=True, frequency_penalty=0.7, top_p=0.9),
)

POISON = 99

Streams = list[list[int]]


class Poisonous:
    """A worker extension: the process dies of every request that has a certain token."""

    def __init__(self, worker: Any) -> None:
        accept = worker.accept

        def accept_or_die(call: Call) -> None:
            news = [new for plan in call.body.plans for new in plan.new] if isinstance(call.body, Step) else []
            if any(POISON in as_ints(new.token_ids) for new in news):
                os.kill(os.getpid(), signal.SIGKILL)
            accept(call)

        worker.accept = accept_or_die


class Rig:
    """Requests run in this thread, one set after the other, over the same formation."""

    def __init__(self, checkpoint: Path, report: Path, **settings: Any) -> None:
        settings = settings_for_chaos(max_num_batched_tokens=16, block_size=4, **settings)
        config = Config.build(model=str(checkpoint), **settings)
        self._report = report
        self._next_id = 0
        self.errors: list[type[PhalanxError]] = []
        """What was healed."""
        self.request_errors: dict[int, str] = {}
        with ExitStack() as stack:
            self.formation = stack.enter_context(start_formation(config, resolve(str(checkpoint)), lambda _: None))
            self.brain = Brain(
                config,
                self.formation,
                num_blocks=self.formation.capacity.num_blocks,
                max_model_len=self.formation.capacity.max_model_len,
                eos_token_ids=(),
                balancing=Balancing(config, self.formation) if config.parallel.enable_eplb else None,
            )
            self._succession = Succession(self.brain, self.formation)
            self._stack = stack.pop_all()
        self.expected = self.run()

    def run(self, after: Callable[[int], None] = lambda num_tokens: None) -> Streams:
        """All requests to their ends; `after` is called after each step with how many tokens have come by then."""
        first, streams, num_tokens = self._next_id, [[] for _ in PROMPTS], 0
        for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
            self.brain.submit(Submit(self._next_id, ints(prompt), sampling))
            self._next_id += 1
        self.brain.reset_prefix_cache()  # or only the first run would compute the prompts
        while self.brain.has_work():
            num_tokens += self._step(first, streams)
            after(num_tokens)
        return streams

    def run_with(self, fault: Fault) -> Streams:
        """All requests, while this happens."""
        assert any(self.formation.collective_rpc("arm_fault", (fault, str(self._report))).result())
        return self.run()

    def pids(self) -> dict[int, int]:
        """Of the ranks that compute."""
        launcher = self.formation._line.executor._launcher
        if isinstance(launcher, LocalLauncher):
            return launcher.pids()
        return {placed.rank: placed.pid for placed in launcher._processes.placed}  # type: ignore[attr-defined]  # of Ray

    def server_pid(self) -> int:
        """Of the fork server of all ranks."""
        stat = Path(f"/proc/{self.pids()[0]}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    def stats(self) -> FormationStats:
        stats = self.formation.stats()
        assert stats is not None
        return stats

    def await_standby(self) -> None:
        expires_at = time.monotonic() + READY_WITHIN_S
        while self.stats().standby != "ready":
            assert time.monotonic() < expires_at, self.stats()
            time.sleep(0.01)

    def close(self) -> None:
        self._stack.close()

    def _step(self, first: int, streams: Streams) -> int:
        self._succession.look()
        try:
            batch = self.brain.step()
        except PhalanxError as error:
            if not self.formation.heals(error):
                raise
            self.errors.append(type(error))
            self._succession.go_on(self.formation.heal(error), error)
            return 0
        self.formation.progressed()
        if batch is None:
            return 0
        request_ids = [
            int.from_bytes(batch.request_ids[i : i + 8], "little") for i in range(0, len(batch.request_ids), 8)
        ]
        for request_id, token in zip(request_ids, as_ints(batch.tokens).tolist(), strict=True):
            streams[request_id - first].append(token)
        self.request_errors.update(batch.errors)
        return len(request_ids)


def kill(pid: int, number: int) -> Callable[[int], None]:
    """For `run`: after a good number of tokens, once."""
    done = [False]

    def after(num_tokens: int) -> None:
        if num_tokens >= 20 and not done[0]:
            done[0] = True
            os.kill(pid, number)

    return after
