from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from engine_brain_rig import EOS, Rig

from phalanx.config import Config
from phalanx.engine.brain import EXPECTS_FOR_STEPS, Brain
from phalanx.errors import RequestError, WorkerError
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import NO_TOKEN, Step, StepPlan, StepResult


class Unanswered:
    """Keeps plans; a step is answered when the brain waits for it."""

    def __init__(self) -> None:
        self.under_way: deque[StepPlan] = deque()
        self.most_under_way = 0
        self.error: Exception | None = None

    def step(self, step: Step) -> Unanswered:
        (plan,) = step.plans
        self.under_way.append(plan)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        return self

    def result(self) -> tuple[StepResult, ...]:
        if self.error is not None:
            raise self.error
        plan = self.under_way.popleft()
        return (StepResult(plan.step, ints([30] * plan.shape.num_samples)),)


def brain_over(executor: Unanswered, **settings: object) -> Brain:
    config = Config.build(model="simulated", block_size=4, **settings)
    return Brain(config, executor, num_blocks=16, max_model_len=32, eos_token_ids=(7,))


@pytest.mark.parametrize(("async_scheduling", "depth"), [(True, 2), (False, 1)])
def test_the_next_plan_is_sent_before_the_outcome_is_awaited(async_scheduling: bool, depth: int) -> None:
    executor = Unanswered()
    brain = brain_over(executor, async_scheduling=async_scheduling)
    brain.submit(Submit(5, ints([1, 2, 3]), SamplingParams(max_tokens=4)))
    batches = []
    while brain.has_work():
        batches.append(brain.step())
    assert executor.most_under_way == depth
    assert not executor.under_way
    assert [as_ints(batch.tokens).tolist() for batch in batches if batch] == [[30]] * 4
    assert batches[0] is not None
    assert batches[-1] is not None
    assert batches[0].cached == ((5, 0),)
    assert batches[-1].finished == ((5, FinishReason.LENGTH),)


def test_who_is_to_move_here_finds_no_other_step_planned() -> None:
    executor = Unanswered()
    brain = brain_over(executor, async_scheduling=True)
    brain.submit(Submit(5, ints([1, 2, 3]), SamplingParams(max_tokens=28)))
    brain.step()
    assert len(executor.under_way) == 1
    brain.submit(Submit(6, ints([4] * 9), SamplingParams(max_tokens=1), is_rehearsal=True))
    under_way: list[int] = []
    is_over = False
    while not is_over:
        batch = brain.step()
        is_over = batch is not None and any(request_id == 6 for request_id, _ in batch.finished)
        under_way.append(len(executor.under_way))
    assert under_way[-1] == 0
    brain.step()
    assert len(executor.under_way) == 0, "it is expected for some steps more"
    for _ in range(EXPECTS_FOR_STEPS):
        brain.step()
    assert len(executor.under_way) == 1


def test_a_failed_step_is_the_callers_to_hear_of() -> None:
    executor = Unanswered()
    brain = brain_over(executor)
    brain.submit(Submit(0, ints([1]), SamplingParams()))
    executor.error = WorkerError(1, "here", "ValueError", "bad", "")
    with pytest.raises(WorkerError):
        brain.step()


class SpoiltRow(Unanswered):
    """Finds no token for the first row that samples in its second step."""

    def result(self) -> tuple[StepResult, ...]:
        plan = self.under_way.popleft()
        tokens = [30] * plan.shape.num_samples
        if plan.step == 1:
            tokens[0] = NO_TOKEN
        return (StepResult(plan.step, ints(tokens)),)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_a_row_without_a_token_ends_its_request_alone(async_scheduling: bool) -> None:
    brain = brain_over(SpoiltRow(), async_scheduling=async_scheduling, max_num_seqs=4)
    for request_id in (0, 1):
        brain.submit(Submit(request_id, ints([1, 2, 3]), SamplingParams(max_tokens=4)))
    batches = []
    while brain.has_work():
        batches.append(brain.step())
    errors = [error for batch in batches if batch for error in batch.errors]
    assert errors == [(0, "the model gave logits that no token can be chosen from")]
    finished = [end for batch in batches if batch for end in batch.finished]
    assert finished == [(0, FinishReason.ERROR), (1, FinishReason.LENGTH)]
    made = [i for batch in batches if batch for i in np.frombuffer(batch.request_ids, np.int64).tolist()]
    assert (made.count(0), made.count(1)) == (1, 4)
    assert brain.stats().replicas[0].num_blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field", "says"),
    [
        ([], 4, "prompt", "at least one token"),
        ([1] * 32, None, "prompt", "at most 31"),
        ([1] * 40, None, "prompt", "at most 31"),
    ],
)
def test_a_prompt_of_the_wrong_length_is_refused(
    prompt: list[int], max_tokens: int | None, field: str, says: str
) -> None:
    brain = brain_over(Unanswered())
    with pytest.raises(RequestError, match=says) as refusal:
        brain.submit(Submit(0, ints(prompt), SamplingParams(max_tokens=max_tokens)))
    assert refusal.value.field == field
    assert not brain.has_work()


@pytest.mark.parametrize(("num_prompt", "field"), [(17, "prompt"), (10, "max_tokens")])
def test_a_request_that_the_pool_could_never_hold_is_refused(num_prompt: int, field: str) -> None:
    rig = Rig(num_blocks=4, block_size=4, max_model_len=64)
    with pytest.raises(RequestError, match="kv_cache_memory") as refusal:
        rig.submit(range(10, 10 + num_prompt), max_tokens=None)
    assert refusal.value.field == field
    rig.submit(range(10, 20), max_tokens=7, ignore_eos=True)  # 17 tokens, of which the last is never computed
    rig.finish()


def test_an_id_that_is_running_is_refused() -> None:
    brain = brain_over(Unanswered())
    brain.submit(Submit(3, ints([1]), SamplingParams()))
    with pytest.raises(RequestError, match="request_id"):
        brain.submit(Submit(3, ints([1]), SamplingParams()))


def test_the_end_of_a_cancelled_request_is_told_once() -> None:
    brain = brain_over(Unanswered())
    brain.submit(Submit(0, ints([1]), SamplingParams()))
    brain.cancel((0, 1))
    brain.cancel((0,))
    assert brain.has_work()
    batch = brain.step()
    assert batch is not None
    assert (batch.tokens, batch.finished) == (b"", ((0, FinishReason.CANCELLED),))
    assert not brain.has_work()
    assert brain.step() is None


def test_a_step_under_way_for_a_cancelled_request_is_still_awaited() -> None:
    executor = Unanswered()
    brain = brain_over(executor)
    brain.submit(Submit(0, ints([1]), SamplingParams()))
    brain.step()
    brain.cancel((0,))
    while brain.has_work():
        brain.step()
    assert not executor.under_way


def test_seeds_are_chosen_once() -> None:
    rig = Rig(num_blocks=6, block_size=4, max_model_len=24, max_num_seqs=3)
    for seed in (None, None, 5):
        rig.submit([10, 11, 12, 13], max_tokens=16, ignore_eos=True, seed=seed)
    rig.finish()
    assert rig.stats.num_preemptions > 0
    seeds: dict[int, set[int]] = {}
    for new in (new for plan in rig.plans for new in plan.new):
        order = [client.sampling.seed for client in rig.clients.values()].index(new.sampling.seed)
        seeds.setdefault(order, set()).add(new.seed)
    assert len(seeds[0]) == 2, "two requests without a seed have one each"
    assert seeds[2] == {5}


def test_stats_count() -> None:
    rig = Rig(max_num_seqs=1, block_size=4)
    prompt = list(range(10, 19))
    for _ in range(2):
        rig.submit(prompt, max_tokens=3, ignore_eos=True)
    rig.step()
    stats = rig.stats
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (1, 1, 3)
    rig.finish()
    stats = rig.stats
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_generated_tokens) == (18, 8, 6)
    assert stats.num_steps == len(rig.plans)


def test_a_steady_decode_step_costs_a_few_bytes_a_request() -> None:
    rig = Rig(max_num_seqs=64, max_num_batched_tokens=512, num_blocks=512, block_size=16)
    for i in range(64):
        rig.submit([10 + i % 30, 11, 12], max_tokens=8, ignore_eos=True)
    rig.finish()
    decode = rig.plans[3]
    assert decode.shape.num_rows == 64
    assert len(decode.slots) + len(decode.num_tokens) == 64 * 8
    assert decode.block_ids == decode.block_slots == decode.dropped == b""
    assert decode.new == ()


def test_logprobs_arrive_with_their_tokens() -> None:
    rig = Rig(num_blocks=64)
    for logprobs in (None, 2, None, 0):
        rig.submit([10, 11], max_tokens=3, ignore_eos=True, logprobs=logprobs)
    batch = rig.step()
    assert batch is not None
    assert batch.logprobs is not None
    tokens = as_ints(batch.tokens)
    entries = as_ints(batch.logprobs.entries)
    ids = np.frombuffer(batch.request_ids, dtype=np.int64)[entries]
    assert ids.tolist() == [1, 3]
    assert as_ints(batch.logprobs.top_ids).reshape(-1, 2)[:, 0].tolist() == tokens[entries].tolist()
    rig.finish()


def test_end_tokens_and_limits_end_an_output() -> None:
    rig = Rig(max_model_len=64)
    for kind in ({}, {"ignore_eos": True}, {"stop_token_ids": tuple(range(8, 40))}, {"min_tokens": 8}):
        rig.submit([10, 11, 12], max_tokens=None, **kind)
    rig.finish()
    plain, ignoring, stopping, late = rig.clients.values()
    assert plain.output[-1] in EOS
    assert plain.reason is FinishReason.STOP
    assert (len(ignoring.output), ignoring.reason) == (61, FinishReason.LENGTH)
    assert len(stopping.output) < len(plain.output)
    assert len(late.output) > 8
