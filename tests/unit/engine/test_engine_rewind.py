"""What a rewind keeps and what it forgets. Rewinds at random moments are in test_engine_brain_properties.py."""

from __future__ import annotations

from random import Random

import msgspec
import numpy as np
import pytest
from engine_brain_rig import Rig

from phalanx.engine.suspects import FAILURES_TO_BLAME
from phalanx.errors import PeerDiedError
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import StepPlan

WAYS = pytest.mark.parametrize(
    "settings",
    [{}, {"async_scheduling": False}, {"pipeline_parallel_size": 3}, {"data_parallel_size": 2}],
    ids=["async", "one step at a time", "pipeline", "replicas"],
)


def kill(rig: Rig, *, num_answered: int = 0, is_blamed: bool = False) -> None:
    """The workers die; the step that finds out brings others."""
    epoch = rig.epoch
    rig.executor.kill(num_answered=num_answered, is_blamed=is_blamed)
    while rig.epoch == epoch:
        rig.step()


def first_plan_of(rig: Rig, epoch: int) -> StepPlan:
    return next(plan for plan in rig.plans if plan.epoch == epoch)


def outputs(rig: Rig) -> list[list[int]]:
    return [client.output for client in rig.clients.values()]


@WAYS
@pytest.mark.parametrize("keeps_cache", [True, False])
def test_streams_go_on_as_if_nothing_had_been(settings: dict[str, object], keeps_cache: bool) -> None:
    rig = Rig(**settings)  # type: ignore[arg-type]
    rig.keeps_cache = keeps_cache
    rig.submit([10, 11, 12], max_tokens=12, ignore_eos=True, logprobs=2)
    rig.submit(range(10, 40), max_tokens=12, ignore_eos=True, seed=3)  # takes several chunks
    for _ in range(10):
        rig.step()
        kill(rig)
    rig.finish()
    assert [len(output) for output in outputs(rig)] == [12, 12]
    assert sum(stats.num_preemptions for stats in rig.brain.stats().replicas) == 0


def test_the_first_plan_brings_everyone_with_what_committed_steps_computed() -> None:
    rig = Rig(max_num_batched_tokens=16, async_scheduling=True)
    rig.submit([10, 11, 12], max_tokens=20, ignore_eos=True)
    rig.step()
    rig.submit(range(10, 40), max_tokens=20, ignore_eos=True)
    for _ in range(2):
        rig.step()
    num_known = [len(client.prompt) + len(client.output) for client in rig.clients.values()]
    assert num_known[1] == 30, "the second prompt is still under way"
    before = rig.plans[-1]
    kill(rig)
    rig.step()
    plan = first_plan_of(rig, 2)
    assert plan.step > before.step, "no number is given twice"
    assert plan.dropped == b""
    assert [new.slot for new in plan.new] == [0, 1]
    assert [len(as_ints(new.token_ids)) for new in plan.new] == num_known
    assert [new.num_computed for new in plan.new] == [num_known[0] - 1, 15]
    assert as_ints(plan.new[0].token_ids).tolist() == rig.clients[0].prompt + rig.clients[0].output[: num_known[0] - 3]
    rig.finish()


def test_without_the_cache_all_wait_again_in_order_of_arrival() -> None:
    rig = Rig(max_num_seqs=3)
    for first in range(5):
        rig.submit([10 + first, 11, 12], max_tokens=8, ignore_eos=True)
    for _ in range(4):
        rig.step()
    rig.keeps_cache = False
    rig.rewind()
    (replica,) = rig.brain._scheduler.replicas
    assert list(replica.waiting) == [0, 1, 2, 3, 4]
    assert replica.cache.entries() == {}
    assert rig.stats.num_blocks_used == 0
    rig.step()
    assert [new.num_computed for new in first_plan_of(rig, 2).new] == [0, 0, 0]
    rig.finish()


def test_a_pipeline_is_not_told_again_the_tokens_that_requests_come_with() -> None:
    rig = Rig(pipeline_parallel_size=2)
    rig.submit([10, 11], max_tokens=8, ignore_eos=True)
    for _ in range(4):
        rig.step()
    kill(rig)
    num_plans = len(rig.plans)
    rig.finish()
    assert rig.plans[num_plans].tokens == b""
    assert all(len(plan.tokens) == 4 for plan in rig.plans[num_plans + 1 :])


def test_workers_are_not_told_to_drop_what_they_never_had() -> None:
    rig = Rig()
    for _ in range(2):
        rig.submit([10, 11], max_tokens=8, ignore_eos=True)
    rig.step()
    rig.brain.cancel([0])  # the workers that had it are killed before they are told
    kill(rig)
    rig.brain.cancel([1])  # the next ones never hear of it
    rig.submit([12], max_tokens=8, ignore_eos=True)
    rig.finish()
    plan = first_plan_of(rig, 2)
    assert plan.dropped == b""
    assert [as_ints(new.token_ids).tolist() for new in plan.new] == [[12]]


def test_a_second_failure_before_the_first_step_is_survived() -> None:
    rig = Rig()
    rig.submit([10, 11], max_tokens=8, ignore_eos=True)
    for _ in range(3):
        rig.step()
    for keeps_cache in (True, True, False, True):
        rig.keeps_cache = keeps_cache
        rig.rewind()
    rig.finish()
    assert first_plan_of(rig, rig.epoch).new[0].num_computed == 0


def test_answers_that_came_before_the_death_still_count() -> None:
    rig = Rig(pipeline_parallel_size=3)
    for first in range(3):
        rig.submit([10 + first], max_tokens=8, ignore_eos=True)
    for _ in range(4):
        rig.step()
    num_tokens = sum(map(len, outputs(rig)))
    rig.executor.kill(num_answered=1, is_blamed=False)
    rig.brain._depth = 1  # nothing more is sent, which would be what finds out
    rig.step()
    assert sum(map(len, outputs(rig))) == num_tokens + 1
    with pytest.raises(PeerDiedError):
        rig.brain.step()
    rig.rewind()
    rig.finish()


def test_the_prefix_cache_outlives_workers_whose_memory_does() -> None:
    rig = Rig()
    for keeps_cache, num_cached in ((True, 0), (True, 8), (False, 0)):
        rig.keeps_cache = keeps_cache
        rig.rewind()
        request_id = rig.submit(range(10, 20), max_tokens=4, ignore_eos=True)
        rig.finish()
        assert rig.clients[request_id].num_cached == num_cached


def test_who_kills_ends_and_the_others_live() -> None:
    rig = Rig()
    for first in range(3):
        rig.submit([10 + first, 11], max_tokens=30, ignore_eos=True, top_k=8 if first == 1 else 0)
    rig.finish()
    reasons = [client.reason for client in rig.clients.values()]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert rig.epoch - 1 == FAILURES_TO_BLAME
    assert rig.errors == {
        1: "the engine has failed 4 times in a row in steps with this request, 2 times with no other; "
        "the last time: rank 0 (pid 1) died"
    }


def test_a_request_that_was_only_there_when_ranks_were_killed_lives() -> None:
    """Kill after kill from outside, before the first step of each new set of ranks, whoever runs then."""
    rig = Rig()
    rig.is_from_outside = True
    rig.submit([10, 11], max_tokens=30, ignore_eos=True)
    for _ in range(12):
        kill(rig, is_blamed=True)
    rig.submit([20, 21], max_tokens=30, ignore_eos=True)
    for _ in range(3):
        kill(rig, is_blamed=True)
        rig.step()
    rig.finish()
    assert not rig.errors


def test_who_kills_as_somebody_from_outside_would_is_found_since_the_others_live() -> None:
    rig = Rig()
    rig.is_from_outside = True
    for first in range(3):
        rig.submit([10 + first, 11], max_tokens=40, ignore_eos=True, top_k=8 if first == 1 else 0)
    rig.finish()
    reasons = [client.reason for client in rig.clients.values()]
    assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
    assert rig.epoch - 1 == FAILURES_TO_BLAME + 1 and "5 times in a row" in rig.errors[1]


def test_while_one_is_tried_the_others_are_held_back() -> None:
    rig = Rig(max_num_seqs=3, async_scheduling=False)
    for first in range(3):
        rig.submit([10 + first, 11], max_tokens=30, ignore_eos=True)
    rig.step()
    for _ in range(2):
        kill(rig, is_blamed=True)
    rig.submit([20], max_tokens=30, ignore_eos=True)
    num_plans = len(rig.plans)
    for _ in range(4):
        rig.step()
    tried = [[as_ints(new.token_ids)[0] for new in plan.new] for plan in rig.plans[num_plans:]]
    assert tried == [[12], [11], [10], [11, 12]], "in the end there are slots for all but the last to come"
    assert rig.stats.num_preemptions == 0
    rig.finish()


def test_a_request_under_trial_that_its_client_cancels_holds_up_nobody() -> None:
    rig = Rig()
    for first in range(2):
        rig.submit([10 + first, 11], max_tokens=30, ignore_eos=True)
    rig.step()
    for _ in range(2):
        kill(rig, is_blamed=True)
    rig.brain.cancel([1])
    rig.finish()


def test_planned_rewinds_make_nobody_suspect() -> None:
    rig = Rig()
    rig.submit([10, 11], max_tokens=30, ignore_eos=True)
    for _ in range(10):
        rig.step()
        rig.rewind()
    rig.finish()
    assert rig.clients[0].reason is FinishReason.LENGTH


def test_seeds_that_nobody_chose_are_kept() -> None:
    rig = Rig()
    rig.submit([10, 11], max_tokens=8, ignore_eos=True)
    for keeps_cache in (True, False):
        rig.step()
        rig.keeps_cache = keeps_cache
        rig.rewind()
    rig.finish()
    seeds = {new.seed for plan in rig.plans for new in plan.new}
    assert len(seeds) == 1
    assert len([plan for plan in rig.plans if plan.new]) == 3


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_preempted_requests_go_on_as_well(keeps_cache: bool) -> None:
    rig = Rig(num_blocks=8, block_size=4, max_model_len=32, max_num_seqs=3)
    rig.keeps_cache = keeps_cache
    for first in range(3):
        rig.submit([10 + first] * 8, max_tokens=20, ignore_eos=True)
    while rig.stats.num_preemptions == 0:
        rig.step()
    kill(rig)
    rig.finish()


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_a_resize_moves_all_requests_and_goes_on_counting(num_replicas: int) -> None:
    rig = Rig(data_parallel_size=2, max_num_seqs=2)
    for first in range(6):
        rig.submit([10 + first, 11, 12, 13, 14], max_tokens=10, ignore_eos=True)
    for _ in range(5):
        rig.step()
    before = rig.brain.stats().replicas
    rig.resize(data_parallel_size=num_replicas)
    after = rig.brain.stats().replicas
    assert len(after) == num_replicas
    assert sum(stats.num_waiting for stats in after) == 6
    assert max(stats.num_waiting for stats in after) <= -(-6 // num_replicas)
    for one, other in zip(before, after, strict=False):
        assert one.num_generated_tokens == other.num_generated_tokens > 0
        assert one.num_steps == other.num_steps
    rig.finish()


def test_a_replica_that_comes_back_counts_on() -> None:
    rig = Rig(data_parallel_size=2)
    for first in range(4):
        rig.submit([10 + first], max_tokens=4, ignore_eos=True)
    rig.step()
    made = [stats.num_generated_tokens for stats in rig.brain.stats().replicas]
    rig.resize(data_parallel_size=1)
    rig.resize(data_parallel_size=2)
    assert [stats.num_generated_tokens for stats in rig.brain.stats().replicas] == made
    assert made == [2, 2]
    rig.finish()


def test_blocks_may_have_another_size_and_number() -> None:
    rig = Rig(block_size=4, num_blocks=64)
    rig.submit(range(10, 30), max_tokens=20, ignore_eos=True)
    for _ in range(6):
        rig.step()
    rig.resize(block_size=8, num_blocks=10)
    rig.submit(range(10, 30), max_tokens=20, ignore_eos=True)
    rig.finish()
    assert rig.stats.num_blocks == 10
    assert rig.clients[1].num_cached == 0 or rig.clients[1].num_cached == 16


@pytest.mark.parametrize("limit", [{"max_model_len": 16}, {"num_blocks": 4}])
def test_who_has_more_tokens_than_there_is_room_for_ends_and_says_so(limit: dict[str, int]) -> None:
    rig = Rig(max_model_len=64, block_size=4)
    long = rig.submit(range(10, 30), max_tokens=20, ignore_eos=True)
    short = rig.submit([10, 11], max_tokens=3, ignore_eos=True)
    middling = rig.submit(range(10, 20), max_tokens=None, ignore_eos=True)
    for _ in range(3):
        rig.step()
    room = 16 if "max_model_len" in limit else 17
    rig.resize(**limit)
    num_made = len(rig.clients[long].output)
    while rig.brain.has_work():
        rig.step()
    reasons = [rig.clients[i].reason for i in (long, short, middling)]
    assert reasons == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]
    assert len(rig.clients[short].output) == 3
    assert len(rig.clients[middling].output) == room - 10
    assert rig.errors == {
        long: f"the engine has changed its size: it now has room for {room} tokens of prompt and output, and this "
        f"request has {20 + num_made}"
    }
    assert rig.stats.num_blocks_used == 0


def test_a_rewind_costs_the_next_plan_only() -> None:
    """The plans after it are deltas again."""
    rig = Rig(max_num_seqs=8)
    for first in range(8):
        rig.submit([10 + first, 11], max_tokens=8, ignore_eos=True)
    rig.step()
    rig.step()
    rig.rewind()
    num_plans = len(rig.plans)
    rig.finish()
    first, second, *_ = rig.plans[num_plans:]
    assert len(first.new) == 8
    assert second.new == ()
    assert np.array_equal(as_ints(first.slots), as_ints(ints(list(range(8)))))


def test_a_rehearsal_counts_for_no_token() -> None:
    """It is there for the prefix cache."""
    rig = Rig()
    rig.submit([10, 11, 12], max_tokens=3, ignore_eos=True)
    rig.finish()
    (before,) = rig.brain.stats().replicas
    rig.brain.submit(Submit(99, ints(range(20, 30)), SamplingParams(max_tokens=1), is_rehearsal=True))
    while rig.brain.has_work():
        rig.brain.step()
    (after,) = rig.brain.stats().replicas
    assert after.num_steps > before.num_steps
    assert msgspec.structs.replace(after, num_steps=before.num_steps) == before


class _Dice(Random):
    """Throws what it is told."""

    thrown = 0.5

    def random(self) -> float:
        return self.thrown


def test_workers_that_were_to_copy_and_died_before_may_do_so_late() -> None:
    """After others have copied in their place, and written on."""
    rig = Rig(block_size=8)
    rig.executor.random, rig.lingers = _Dice(), True
    rig.submit([1, 2, 3], max_tokens=30, ignore_eos=True)
    for _ in range(4):
        rig.step()
    rig.executor.random.thrown = 0.0  # they are killed at once
    rig.rewind()
    assert len(rig.brain.copies) == 1
    rig.executor.random.thrown = 0.9
    rig.rewind()
    assert len(rig.brain.copies) == 2, "and what was to be copied to is copied from"
    for _ in range(3):
        rig.step()
    assert rig.brain.copies == ()
    rig.executor.random.thrown = 0.0  # now they copy
    rig.step()
    rig.executor.random.thrown = 0.9
    rig.finish()


def test_blocks_are_waited_for_where_too_few_can_be_spared() -> None:
    rig = Rig(num_blocks=4, block_size=4, max_model_len=16)
    rig.executor.random, rig.lingers = _Dice(), True
    rig.submit([1, 2, 3], max_tokens=12, ignore_eos=True)
    for _ in range(8):
        rig.step()
    rig.rewind()
    for _ in range(8):  # the request does not give way to itself over and over
        rig.step()
    assert rig.brain.has_work(), "there is no block for its last tokens"
    assert rig.stats.num_preemptions == 0
    rig.finish()
    assert rig.stats.num_preemptions == 0
