"""Micro-batches: what a brain does to keep every stage of a pipeline busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import StepPlan
from phalanx.testing.simulated_worker import SimulatedPipeline, SimulatedWorker, expected_output

STAGE_S = 0.010
NUM_TOKENS = 40
MAX_MODEL_LEN = 256


class Pipeline:
    """A brain over simulated stages; `run` serves prompts that all arrive at once."""

    def __init__(self, num_stages: int, **settings: object) -> None:
        limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 4}
        self.num_stages = num_stages
        self.worker = SimulatedWorker(**limits, max_model_len=MAX_MODEL_LEN, num_blocks=1024, num_stages=num_stages)
        self.stages = SimulatedPipeline(self.worker, [STAGE_S] * num_stages)
        config = Config.build(model="simulated", pipeline_parallel_size=num_stages, **limits, **settings)
        self.brain = Brain(config, self.stages, num_blocks=1024, max_model_len=MAX_MODEL_LEN, eos_token_ids=())
        self.outputs: dict[int, list[int]] = {}

    def run(self, prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
        for request_id, prompt in enumerate(prompts):
            self.outputs[request_id] = []
            self.brain.submit(Submit(request_id, ints(prompt), sampling))
        while self.brain.has_work():
            batch = self.brain.step()
            if batch is not None:
                ids = memoryview(batch.request_ids).cast("q").tolist()
                for request_id, token in zip(ids, as_ints(batch.tokens).tolist(), strict=True):
                    self.outputs[request_id].append(token)
        for prompt, output in zip(prompts, self.outputs.values(), strict=True):
            expected, _ = expected_output(prompt, sampling, eos_token_ids=(), max_model_len=MAX_MODEL_LEN)
            assert output == expected

    def busy_shares(self) -> list[float]:
        """For what share of the time each stage has computed."""
        return [busy_s / self.stages.now_s for busy_s in self.stages.busy_s]


def slots_of(plan: StepPlan) -> set[int]:
    return set(as_ints(plan.slots).tolist())


def decodes(pipeline: Pipeline) -> Iterator[tuple[StepPlan, ...]]:
    """What was under way at the moments when a step without prompts was sent, once the pipeline was full."""
    for under_way in pipeline.stages.sent:
        if len(under_way) == pipeline.num_stages and under_way[-1].shape.num_rows == under_way[-1].shape.num_tokens:
            yield under_way


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_every_stage_computes_nearly_all_the_time(num_stages: int) -> None:
    pipeline = Pipeline(num_stages)
    pipeline.run([[10 + i, 11] for i in range(12)])
    assert all(share > 0.9 for share in pipeline.busy_shares()), pipeline.busy_shares()
    full = list(decodes(pipeline))
    assert len(full) > 0.9 * num_stages * NUM_TOKENS - num_stages
    for under_way in full:
        assert len(set.union(*map(slots_of, under_way))) == sum(len(slots_of(plan)) for plan in under_way)


def test_one_step_at_a_time_leaves_stages_idle() -> None:
    pipeline = Pipeline(2, async_scheduling=False)
    pipeline.run([[10 + i, 11] for i in range(12)])
    assert pipeline.busy_shares() == [pytest.approx(0.5)] * 2
    assert all(len(under_way) == 1 for under_way in pipeline.stages.sent)
    assert pipeline.stages.sent[-1][0].shape.num_rows == 12, "nothing is shared out when nothing overlaps"


def test_a_lone_request_waits_for_its_own_tokens() -> None:
    pipeline = Pipeline(3)
    pipeline.run([[10, 11]])
    assert all(len(under_way) == 1 for under_way in pipeline.stages.sent)
    assert pipeline.stages.now_s == pytest.approx(NUM_TOKENS * 3 * STAGE_S)


def test_chunks_of_one_prompt_follow_each_other() -> None:
    pipeline = Pipeline(3)
    pipeline.run([[10 + i % 30 for i in range(192)]], num_tokens=1)
    assert [len(under_way) for under_way in pipeline.stages.sent] == [1, 2, 3]
    assert pipeline.stages.now_s == pytest.approx((3 + 2) * STAGE_S), "three chunks through three stages"


def test_micro_batches_are_of_one_size_and_all_requests_advance_alike() -> None:
    pipeline = Pipeline(2)
    pipeline.run([[10 + i, 11] for i in range(10)])
    for under_way in list(decodes(pipeline))[:-4]:  # towards the end there are fewer requests
        assert {plan.shape.num_rows for plan in under_way} == {5}
    turns = Counter(slot for _, plan in decodes(pipeline) for slot in slots_of(plan))
    assert max(turns.values()) - min(turns.values()) <= 1


def test_requests_that_end_do_not_leave_the_micro_batches_uneven() -> None:
    pipeline = Pipeline(2)
    sampling = [SamplingParams(temperature=0, max_tokens=4 if i < 5 else 60) for i in range(12)]
    for request_id, params in enumerate(sampling):
        pipeline.brain.submit(Submit(request_id, ints([10 + request_id, 11]), params))
    while pipeline.brain.has_work():
        pipeline.brain.step()
    last = list(decodes(pipeline))[-20]
    assert sorted(plan.shape.num_rows for plan in last) == [3, 4]


def test_a_plan_tells_the_tokens_that_were_sampled_and_no_others() -> None:
    pipeline = Pipeline(2)
    pipeline.run([[10, 11], [12, 13]], num_tokens=3)
    first, *later = [under_way[-1] for under_way in pipeline.stages.sent]
    assert (first.token_slots, first.tokens) == (b"", b"")
    told = [
        (slot, token)
        for plan in later
        for slot, token in zip(as_ints(plan.token_slots), as_ints(plan.tokens), strict=True)
    ]
    assert sorted(told) == sorted((slot, token) for slot in (0, 1) for token in pipeline.outputs[slot][:2])


def test_without_a_pipeline_no_tokens_are_told() -> None:
    pipeline = Pipeline(1)
    pipeline.run([[10, 11], [12, 13]])
    assert all(under_way[-1].tokens == b"" for under_way in pipeline.stages.sent)
