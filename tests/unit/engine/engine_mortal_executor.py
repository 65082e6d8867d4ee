"""Simulated workers that are killed at any moment, also by requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from phalanx.errors import PeerDiedError
from phalanx.protocol.worker import Step, StepResult
from phalanx.testing.simulated_worker import Hashes, Places, SimulatedExecutor, SimulatedWorker


class Answer:
    """Of a step, unless the workers are killed before it is asked for."""

    def __init__(self, executor: MortalExecutor, results: tuple[StepResult, ...]) -> None:
        self.is_lost = False
        self.results = results
        self._executor = executor

    def result(self) -> tuple[StepResult, ...]:
        if self.is_lost:
            raise PeerDiedError("rank 0", 1)
        self._executor.answered(self)
        return self.results


class MortalExecutor:
    """As long as the workers live they do what those of a SimulatedExecutor do.

    A request that asks for a `top_k` kills them in the step that brings it to so many tokens in the KV cache: simulated
    workers have no other use for that number. Of the steps that are not answered at death the first ones may still be;
    what the others were to write to the KV cache is written in part, and in part is rubbish.
    """

    def __init__(self, workers: Sequence[SimulatedWorker]) -> None:
        self.random = Random(0)
        self.steps: list[Step] = []
        self.is_dead = False
        self.is_blamed = False
        """Whether the step under way is to be held responsible."""
        self._under_way: deque[tuple[Answer, list[tuple[Places, Places]]]] = deque()
        self.replace(workers)

    @property
    def workers(self) -> Sequence[SimulatedWorker]:
        return self._executor.workers

    def replace(self, workers: Sequence[SimulatedWorker]) -> None:
        """Others take the place of those that were there."""
        self._executor = SimulatedExecutor(*workers)
        self._executor.steps = self.steps
        self._under_way.clear()
        self.is_dead = False

    def step(self, step: Step) -> Answer:
        if self.is_dead:
            raise PeerDiedError("rank 0", 1)
        answer = Answer(self, self._executor.step(step).result())
        self._under_way.append((answer, [worker.written for worker in self.workers]))
        for worker, plan in zip(self.workers, step.plans, strict=True):
            if any(0 < sampling.top_k <= num_computed for sampling, num_computed in worker.rows(plan)):
                self.kill(num_answered=self.random.randrange(len(self._under_way)), is_blamed=True)
                break
        return answer

    def kill(self, *, num_answered: int, is_blamed: bool) -> None:
        """`num_answered` of the steps under way are answered first."""
        self.is_dead, self.is_blamed = True, is_blamed
        for answer, written in list(self._under_way)[num_answered:]:
            answer.is_lost = True
            for worker, (blocks_T, offsets_T) in zip(self.workers, written, strict=True):
                rubbish = [self.random.random() < 0.5 for _ in blocks_T]
                worker.cells_BO[blocks_T[rubbish], offsets_T[rubbish]] = self.random.getrandbits(64)

    def lingering(self) -> list[tuple[Hashes, Places, Places]]:
        """Where the workers may yet write that were killed: cells of a KV cache, blocks and offsets in it."""
        return [
            (worker.cells_BO, *places)
            for _, written in self._under_way
            for worker, places in zip(self.workers, written, strict=True)
        ]

    def answered(self, answer: Answer) -> None:
        oldest, _ = self._under_way.popleft()
        assert oldest is answer, "answers come in the order of the steps"
