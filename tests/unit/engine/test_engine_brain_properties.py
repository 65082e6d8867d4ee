"""Random traffic: whatever happens around it, a request's output is the one it has alone."""

from __future__ import annotations

import pytest
from engine_brain_rig import VOCAB_SIZE, Rig
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40

# Few different tokens and common beginnings, so that prefixes meet.
_prompts = st.builds(
    lambda shared, own: [11, 12, 13, 14, 15, 16, 17, 18, 19, 20][:shared] + own,
    st.integers(0, 10),
    st.lists(st.integers(10, 12), min_size=1, max_size=20),
)
_samplings = st.fixed_dictionaries(
    {"max_tokens": st.one_of(st.integers(4, 30), st.none()), "ignore_eos": st.booleans()},
    optional={
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8).map(tuple),
        "seed": st.integers(-5, 5),
        "logprobs": st.integers(0, 3),
    },
)
_killing = st.tuples(_samplings, st.integers(1, MAX_MODEL_LEN)).map(lambda both: {**both[0], "top_k": both[1]})
_rigs = st.builds(
    Rig,
    block_size=st.just(BLOCK_SIZE),
    max_model_len=st.just(MAX_MODEL_LEN),
    num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 18),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 30),
    async_scheduling=st.booleans(),
    enable_prefix_caching=st.booleans(),
    pipeline_parallel_size=st.integers(1, 4),
    data_parallel_size=st.integers(1, 3),
)


class Traffic(RuleBasedStateMachine):
    """Arrivals, cancellations, resets of the prefix cache, deaths of the workers and steps in any order."""

    @initialize(rig=_rigs)
    def start(self, rig: Rig) -> None:
        self.rig = rig

    @rule(prompt=_prompts, sampling=_samplings)
    def submit(self, prompt: list[int], sampling: dict[str, object]) -> None:
        self.rig.submit(prompt, **sampling)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.rig.brain.has_work():
                self.rig.step()

    @rule(prompt=_prompts, sampling=_killing)
    def submit_what_kills(self, prompt: list[int], sampling: dict[str, object]) -> None:
        self.rig.submit(prompt, **sampling)

    @rule(num_answered=st.integers(0, 4), keeps_cache=st.booleans())
    def kill(self, num_answered: int, keeps_cache: bool) -> None:
        self.rig.keeps_cache = keeps_cache
        self.rig.executor.kill(num_answered=num_answered, is_blamed=False)

    @rule(keeps_cache=st.booleans(), lingers=st.booleans())
    def rewind(self, keeps_cache: bool, lingers: bool) -> None:
        self.rig.keeps_cache, self.rig.lingers = keeps_cache, lingers
        self.rig.rewind()

    @rule()
    def end_lingering(self) -> None:
        self.rig.end_lingering()

    @rule(
        num_replicas=st.integers(1, 3),
        num_blocks=st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 18),
        num_passes=st.integers(0, 2),
    )
    def resize(self, num_replicas: int, num_blocks: int, num_passes: int) -> None:
        self.rig.resize(data_parallel_size=num_replicas, num_blocks=num_blocks, num_passes=num_passes)

    @precondition(lambda self: self.rig.clients)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.rig.clients)))
        self.rig.brain.cancel([request_id, request_id, 999])

    @rule()
    def reset_prefix_cache(self) -> None:
        self.rig.reset_prefix_cache()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.finish()


class TestTraffic(Traffic.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestMuchTraffic(Traffic.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_who_has_a_slot_when_the_workers_die_need_not_be_who_had_it_at_the_reset() -> None:
    rig = Rig(block_size=4, max_model_len=40, num_blocks=10, max_num_seqs=1, async_scheduling=False)
    first = rig.submit([10] * 9, max_tokens=20)
    rig.step()
    rig.submit([11, 12, 13, 14, 15, 10], max_tokens=4)
    rig.reset_prefix_cache()
    rig.brain.cancel([first])
    rig.executor.kill(num_answered=0, is_blamed=False)
    rig.step()
    rig.finish()
