"""Random traffic: each of several replicas that are planned together does what it would do alone."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import numpy as np
import pytest

from phalanx.engine.request import Request
from phalanx.engine.scheduler import PlannedStep, Scheduler
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import NO_TOKEN, StepPlan, StepResult

EOS = 7
MAX_MODEL_LEN = 24
BLOCK_SIZE = 2
MAX_UNDER_WAY = 3
TOKENS = [*[20, 21] * 15, EOS, NO_TOKEN]


def request(request_id: int, prompt: list[int], max_tokens: int) -> Request:
    return Request(
        request_id=request_id,
        arrival=request_id,
        token_ids=np.array(prompt, dtype=np.int32),
        num_prompt=len(prompt),
        max_len=len(prompt) + max_tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=request_id,
        end_token_ids=(EOS,),
    )


def tokens_by_id(batch: TokenBatch) -> list[tuple[int, int]]:
    ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
    return list(zip(ids, as_ints(batch.tokens).tolist(), strict=True))


class Lone:
    """One of the replicas with a scheduler to itself."""

    def __init__(self, limits: dict[str, object]) -> None:
        self.scheduler = Scheduler(**limits)  # type: ignore[arg-type]
        self.under_way: deque[PlannedStep | None] = deque()
        self._told_early = b""

    def plan(self, together: StepPlan | None) -> None:
        """The next step must be the one that was planned together with the other replicas."""
        planned = self.scheduler.plan()
        if together is None or together.shape.num_rows == 0:
            assert planned is None
            if together is not None:
                self.under_way.append(None)
                self._told_early += together.dropped
            return
        assert planned is not None, "it would have nothing to compute alone"
        (alone,) = planned.step.plans
        dropped = self._told_early + together.dropped
        assert alone == msgspec.structs.replace(together, step=alone.step, dropped=dropped)
        self._told_early = b""
        self.under_way.append(planned)

    def commit(self, tokens: list[int]) -> TokenBatch | None:
        """What the oldest step gives, if it had a row here."""
        planned = self.under_way.popleft()
        if planned is None:
            return None
        return self.scheduler.commit(planned, [StepResult(planned.step.number, ints(tokens))])


class Traffic:
    """Arrivals, cancellations, resets of the prefix cache, plans and commits in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        max_num_seqs = self.random.randint(1, 6)
        limits: dict[str, object] = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + self.random.randint(0, 12),
            "max_model_len": MAX_MODEL_LEN,
            "block_size": BLOCK_SIZE,
            "num_blocks": self.random.randint(MAX_MODEL_LEN // BLOCK_SIZE, 24),
            "is_prefix_caching": self.random.random() < 0.8,
            "eos_token_ids": (EOS,),
            **self.random.choice([{}, {}, {"is_pipelined": True, "num_micro_batches": self.random.randint(1, 3)}]),
        }
        num_replicas = self.random.randint(2, 5)
        self.together = Scheduler(**limits, num_replicas=num_replicas)  # type: ignore[arg-type]
        self.alone = [Lone(limits) for _ in range(num_replicas)]
        self.under_way: deque[PlannedStep] = deque()
        self.num_requests = 0

    def run(self, num_actions: int) -> None:
        """Returns when all requests have ended."""
        weights = {self.add: 30, self.plan: 60, self.commit: 50, self.cancel: 2, self.reset_prefix_cache: 1}
        for action in self.random.choices(list(weights), list(weights.values()), k=num_actions):
            action()
        while len(self.together) or self.under_way:
            self.plan()
            self.commit()

    def add(self) -> None:
        prompt, max_tokens = self.random.choices([10, 11], k=self.random.randint(1, 12)), self.random.randint(1, 12)
        joined = request(self.num_requests, prompt, max_tokens)
        self.together.add(joined)
        self.alone[joined.replica].scheduler.add(request(self.num_requests, prompt, max_tokens))
        self.num_requests += 1

    def cancel(self) -> None:
        request_ids = self.random.sample(range(self.num_requests + 1), min(self.num_requests, 3))
        ended = [i for lone in self.alone for i in lone.scheduler.cancel(request_ids)]
        assert sorted(self.together.cancel(request_ids)) == sorted(ended)

    def reset_prefix_cache(self) -> None:
        for scheduler in (self.together, *(lone.scheduler for lone in self.alone)):
            scheduler.reset_prefix_cache()

    def plan(self) -> None:
        if len(self.under_way) == MAX_UNDER_WAY:
            return
        planned = self.together.plan()
        if planned is not None:
            self.under_way.append(planned)
        for i, lone in enumerate(self.alone):
            lone.plan(None if planned is None else planned.step.plans[i])
        self.compare()

    def commit(self) -> None:
        if not self.under_way:
            return
        planned = self.under_way.popleft()
        tokens = [self.random.choices(TOKENS, k=plan.shape.num_samples) for plan in planned.step.plans]
        batch = self.together.commit(planned, [StepResult(planned.step.number, ints(own)) for own in tokens])
        batches = [lone.commit(own) for lone, own in zip(self.alone, tokens, strict=True)]
        apart = [one for one in batches if one is not None]
        assert tokens_by_id(batch) == [pair for one in apart for pair in tokens_by_id(one)]
        assert sorted(batch.finished) == sorted(end for one in apart for end in one.finished)
        assert batch.errors == tuple(error for one in apart for error in one.errors)
        assert batch.cached == tuple(entry for one in apart for entry in one.cached)
        self.compare()

    def compare(self) -> None:
        """What each replica has must be what it has alone."""
        for replica, lone in zip(self.together.replicas, self.alone, strict=True):
            (alone,) = lone.scheduler.replicas
            assert list(replica.waiting) == list(alone.waiting)
            assert replica.pool.num_free == alone.pool.num_free
            assert replica.cache.entries() == alone.cache.entries()
            assert self.together.running.num_in(replica.index) == lone.scheduler.running.num_in(0)
            totals = (self.together.totals, replica.index), (lone.scheduler.totals, 0)
            for name in ("num_preemptions_P", "num_prompt_tokens_P", "num_cached_tokens_P", "num_generated_tokens_P"):
                joined, apart = (getattr(count, name)[index] for count, index in totals)
                assert joined == apart, name


@pytest.mark.parametrize("seed", range(40))
def test_each_replica_does_what_it_would_do_alone(seed: int) -> None:
    Traffic(seed).run(150)


@pytest.mark.slow
def test_each_replica_does_what_it_would_do_alone_in_much_traffic() -> None:
    for seed in range(1000, 1200):
        Traffic(seed).run(300)
