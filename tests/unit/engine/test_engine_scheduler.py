"""The policy, plan by plan. What holds over random traffic is in test_engine_brain_properties.py."""

from __future__ import annotations

import numpy as np

from phalanx.engine.pace import AheadLimits, StepTokens
from phalanx.engine.request import Request
from phalanx.engine.scheduler import PlannedStep, Scheduler
from phalanx.protocol.client import TokenBatch
from phalanx.protocol.columns import LogprobColumns, as_floats, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import StepPlan, StepResult

EOS = 7
TOKEN = 40


def scheduler(**limits: object) -> Scheduler:
    defaults: dict[str, object] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 64,
        "is_prefix_caching": True,
        "eos_token_ids": (EOS,),
    }
    return Scheduler(**{**defaults, **limits})  # type: ignore[arg-type]


def request(
    request_id: int,
    prompt: int | list[int],
    *,
    max_tokens: int = 40,
    is_rehearsal: bool = False,
    **sampling: object,
) -> Request:
    """A number stands for a prompt of that length that shares nothing with others."""
    tokens = [1000 * (request_id + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(
        request_id=request_id,
        arrival=request_id,
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt=len(tokens),
        max_len=len(tokens) + max_tokens,
        sampling=params,
        seed=request_id,
        end_token_ids=(*params.stop_token_ids, EOS),
        is_rehearsal=is_rehearsal,
    )


def plan(scheduler: Scheduler) -> PlannedStep:
    step = scheduler.plan()
    assert step is not None
    return step


def sent(step: PlannedStep) -> StepPlan:
    """What the workers of the one replica are told."""
    (plan,) = step.step.plans
    return plan


def rows(step: PlannedStep) -> list[tuple[int, int]]:
    """Slot and number of tokens of each row."""
    return list(zip(as_ints(sent(step).slots).tolist(), as_ints(sent(step).num_tokens).tolist(), strict=True))


def commit(scheduler: Scheduler, step: PlannedStep, tokens: list[int] | None = None) -> TokenBatch:
    """With TOKEN for every sample by default."""
    found = [TOKEN] * sent(step).shape.num_samples if tokens is None else tokens
    return scheduler.commit(step, [StepResult(step.step.number, ints(found))])


def tokens_by_id(batch: TokenBatch) -> dict[int, int]:
    ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
    return dict(zip(ids, as_ints(batch.tokens).tolist(), strict=True))


def test_decodes_come_first_then_prompts_under_way_then_new_requests() -> None:
    brain = scheduler()
    brain.add(request(0, 5))
    commit(brain, plan(brain))
    brain.add(request(1, 40))
    brain.add(request(2, 3))
    first = plan(brain)
    assert rows(first) == [(0, 1), (1, 15)], "what is left of 16 tokens goes to the next prompt"
    commit(brain, first)
    assert rows(plan(brain)) == [(0, 1), (1, 15)], "a prompt under way comes before one that waits"
    third = plan(brain)
    assert rows(third) == [(0, 1), (1, 10), (2, 3)]
    assert [new.slot for new in sent(third).new] == [2]
    assert (sent(third).shape.num_tokens, sent(third).shape.num_rows, sent(third).shape.num_samples) == (14, 3, 3)


def test_rows_with_one_token_come_first_also_when_a_chunk_has_one() -> None:
    brain = scheduler()
    brain.add(request(0, 15))
    brain.add(request(1, 5))
    assert rows(plan(brain)) == [(1, 1), (0, 15)]


def test_of_a_rehearsal_there_is_only_as_much_as_others_wait_for() -> None:
    limits = AheadLimits(beside=3, alone=8)
    brain = scheduler()
    brain.add(request(0, 5))
    commit(brain, plan(brain))
    brain.add(request(1, 30, max_tokens=1, is_rehearsal=True))
    brain.add(request(2, 9))
    first = brain.plan(limits)
    assert first is not None and rows(first) == [(0, 1), (1, 3), (2, 9)], "a prompt takes what it is not to have"
    assert first.tokens == StepTokens(decoding=1, prompts=9, ahead=3)
    commit(brain, first)
    none = brain.plan(AheadLimits(0, 8))
    assert none is not None and rows(none) == [(0, 1), (2, 1)]
    commit(brain, none)
    brain.cancel([0, 2])
    alone = brain.plan(AheadLimits(0, 8))
    assert alone is not None and rows(alone) == [(1, 8)]
    assert brain.plan(AheadLimits(0, 8)) is None, "who is under way may be one of others"
    commit(brain, alone)
    assert rows(plan(brain)) == [(1, 16)], "without limits as much as fits"


def test_admission_keeps_the_order_of_arrival() -> None:
    brain = scheduler(num_blocks=10, max_num_batched_tokens=64)
    brain.add(request(0, 24, max_tokens=4))
    brain.add(request(1, 24, max_tokens=4))  # no room
    brain.add(request(2, 2, max_tokens=4))  # there would be room for this one
    step = plan(brain)
    assert rows(step) == [(0, 24)]
    assert list(brain.replicas[0].waiting) == [1, 2]


def test_no_more_run_than_there_are_slots() -> None:
    brain = scheduler(max_num_seqs=2)
    for request_id in range(3):
        brain.add(request(request_id, 2, max_tokens=1))
    step = plan(brain)
    assert len(rows(step)) == 2
    commit(brain, step)
    step = plan(brain)
    assert len(rows(step)) == 1
    assert sorted(as_ints(sent(step).dropped).tolist()) == [0, 1], "workers hear of free slots with the next plan"


def test_a_plan_runs_ahead_of_the_outcome_of_the_one_before() -> None:
    brain = scheduler()
    brain.add(request(0, 4))
    first, second = plan(brain), plan(brain)
    assert rows(second) == [(0, 1)]
    assert as_ints(sent(second).block_slots).tolist() == [0], "the token of the first step needs a second block"
    assert tokens_by_id(commit(brain, first, [20])) == {0: 20}
    assert tokens_by_id(commit(brain, second, [21])) == {0: 21}


def test_what_comes_after_the_end_is_dropped() -> None:
    brain = scheduler()
    brain.add(request(0, 4))
    first, second = plan(brain), plan(brain)
    batch = commit(brain, first, [EOS])
    assert tokens_by_id(batch) == {0: EOS}, "the token that ended the output counts"
    assert batch.finished == ((0, FinishReason.STOP),)
    assert brain.replicas[0].pool.num_free == brain.replicas[0].pool.num_blocks
    batch = commit(brain, second, [21])
    assert (batch.tokens, batch.finished) == (b"", ())
    assert brain.plan() is None


def test_the_length_limit_is_known_ahead() -> None:
    brain = scheduler()
    brain.add(request(0, 4, max_tokens=2))
    first, second = plan(brain), plan(brain)
    assert brain.plan() is None, "both tokens are under way"
    assert commit(brain, first).finished == ()
    assert commit(brain, second).finished == ((0, FinishReason.LENGTH),)


def test_the_end_token_wins_over_the_length_limit() -> None:
    brain = scheduler()
    brain.add(request(0, 4, max_tokens=1))
    assert commit(brain, plan(brain), [EOS]).finished == ((0, FinishReason.STOP),)


def test_min_tokens_keeps_an_output_going() -> None:
    brain = scheduler()
    brain.add(request(0, 4, min_tokens=2, stop_token_ids=(9,)))
    for token, finished in ((EOS, False), (9, False), (9, True)):
        assert bool(commit(brain, plan(brain), [token]).finished) == finished


def test_a_prompt_that_is_cached_in_full_is_computed_from_its_last_block_on() -> None:
    brain = scheduler()
    prompt = list(range(100, 108))
    brain.add(request(0, prompt))
    commit(brain, plan(brain))
    brain.add(request(1, prompt))
    step = plan(brain)
    (new,) = sent(step).new
    assert new.num_computed == 4
    assert rows(step) == [(0, 1), (1, 4)]
    held = brain.running.block_ids_SB
    assert held[0, 0] == held[1, 0], "the first block is shared"
    assert held[0, 1] != held[1, 1], "the second is written, so it is not"
    assert commit(brain, step).cached == ((1, 4),)


def test_blocks_are_found_only_after_the_commit_that_filled_them() -> None:
    brain = scheduler(max_num_batched_tokens=32)
    prompt = list(range(100, 110))
    brain.add(request(0, prompt))
    plan(brain)
    brain.add(request(1, prompt))
    assert sent(plan(brain)).new[0].num_computed == 0


def test_what_decoding_filled_is_found_too() -> None:
    brain = scheduler()
    brain.add(request(0, [1, 2, 3], max_tokens=6))
    output = list(range(50, 56))
    for token in output:
        commit(brain, plan(brain), [token])
    assert len(brain) == 0
    brain.add(request(1, [1, 2, 3, *output, 99]))
    assert sent(plan(brain)).new[0].num_computed == 8


def test_after_a_reset_nothing_is_found_of_requests_that_have_ended() -> None:
    brain = scheduler()
    prompt = list(range(100, 109))
    brain.add(request(0, prompt, max_tokens=1))
    commit(brain, plan(brain))
    brain.reset_prefix_cache()
    assert brain.replicas[0].pool.num_free == brain.replicas[0].pool.num_blocks
    brain.add(request(1, prompt, max_tokens=1))
    step = plan(brain)
    assert sent(step).new[0].num_computed == 0
    commit(brain, step)
    brain.add(request(2, prompt))
    assert sent(plan(brain)).new[0].num_computed == 8, "what was computed since then is found"


def test_after_a_reset_nothing_is_ever_found_of_requests_that_run() -> None:
    """Also what they compute later: it depends on the keys and values that they had before."""
    brain = scheduler(max_num_batched_tokens=8)
    prompt = list(range(100, 120))
    brain.add(request(0, prompt))
    first, under_way = plan(brain), plan(brain)
    commit(brain, first)
    assert len(brain.replicas[0].cache.entries()) == 2
    brain.reset_prefix_cache()
    commit(brain, under_way)
    commit(brain, plan(brain))
    for _ in range(8):
        commit(brain, plan(brain))
    assert int(brain.running.num_computed_S[0]) == 28
    assert brain.replicas[0].cache.entries() == {}
    brain.cancel([0])
    assert brain.replicas[0].cache.entries() == {}
    assert brain.replicas[0].pool.num_free == brain.replicas[0].pool.num_blocks


def test_who_gives_way_after_a_reset_computes_all_anew_and_is_found_again() -> None:
    brain = scheduler(num_blocks=6, max_num_seqs=2)
    for request_id in range(2):
        brain.add(request(request_id, 8, max_tokens=12))
    commit(brain, plan(brain))
    brain.reset_prefix_cache()
    while brain.totals.num_preemptions_P[0] == 0:
        commit(brain, plan(brain))
    brain.cancel([0])
    step = plan(brain)
    (back,) = sent(step).new
    assert as_ints(back.token_ids)[:8].tolist() == list(range(2000, 2008))
    assert back.num_computed == 0
    commit(brain, step)
    assert len(brain.replicas[0].cache.entries()) == len(as_ints(back.token_ids)) // 4


def test_idle_blocks_that_are_found_are_no_longer_free() -> None:
    brain = scheduler(num_blocks=4)
    brain.add(request(0, list(range(13)), max_tokens=1))
    commit(brain, plan(brain))
    brain.add(request(1, 4, max_tokens=8))
    first = plan(brain)
    brain.add(request(2, list(range(13)), max_tokens=1))  # finds what is left of three blocks, and needs one more
    assert len(sent(first).new) == 1
    assert rows(plan(brain)) == [(0, 1)]
    assert list(brain.replicas[0].waiting) == [2]


def test_what_a_request_finds_of_its_own_after_giving_way_does_not_count_as_cached() -> None:
    brain = scheduler(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=3)
    brain.add(request(0, 4, max_tokens=12))
    brain.add(request(1, 20, max_tokens=4))
    while brain.totals.num_preemptions_P[0] == 0:
        commit(brain, plan(brain))
    while 1 in brain.replicas[0].waiting:
        step = plan(brain)
        batch = commit(brain, step)
    (back,) = sent(step).new
    assert back.num_computed > 0
    while not batch.cached:
        batch = commit(brain, plan(brain))
    assert batch.cached == ((1, 0),)


def test_without_prefix_caching_nothing_is_found() -> None:
    brain = scheduler(is_prefix_caching=False)
    for request_id in range(2):
        brain.add(request(request_id, list(range(10)), max_tokens=1))
        step = plan(brain)
        assert sent(step).new[0].num_computed == 0
        commit(brain, step)
    assert brain.replicas[0].cache.entries() == {}


def test_the_last_to_arrive_gives_way_and_comes_back_first() -> None:
    brain = scheduler(num_blocks=6, is_prefix_caching=False)
    for request_id in range(3):
        brain.add(request(request_id, 4, max_tokens=16))
    step = plan(brain)
    assert len(sent(step).new) == 3
    commit(brain, step)
    for _ in range(4):  # each fills its second block; a third one for each there is not
        commit(brain, plan(brain))
    brain.add(request(3, 2, max_tokens=8))
    step = plan(brain)
    assert rows(step) == [(0, 1), (1, 1)]
    assert as_ints(sent(step).dropped).tolist() == [2]
    assert list(brain.replicas[0].waiting) == [2, 3], "at the front of the queue"
    assert brain.totals.num_preemptions_P[0] == 1
    commit(brain, step)
    brain.cancel([0, 1])
    (back, _) = sent(plan(brain)).new
    assert as_ints(back.token_ids).tolist() == [*range(3000, 3004), *[TOKEN] * 5], "with all that is known of it"
    assert (back.num_prompt, back.seed) == (4, 2)


def test_a_sample_under_way_for_who_gave_way_is_dropped() -> None:
    brain = scheduler(num_blocks=5, is_prefix_caching=False)
    for request_id in range(2):
        brain.add(request(request_id, 7, max_tokens=8))
    first, second, third = plan(brain), plan(brain), plan(brain)
    assert [rows(step) for step in (second, third)] == [[(0, 1), (1, 1)], [(0, 1)]]
    assert list(brain.replicas[0].waiting) == [1]
    assert tokens_by_id(commit(brain, first)) == {0: TOKEN}
    assert tokens_by_id(commit(brain, second)) == {0: TOKEN}
    brain.cancel([0])
    (back,) = sent(plan(brain)).new
    assert as_ints(back.token_ids).tolist() == list(range(2000, 2007))


def test_nobody_gives_way_while_a_request_is_about_to_end() -> None:
    brain = scheduler(num_blocks=5, is_prefix_caching=False)
    brain.add(request(0, 7, max_tokens=8))
    brain.add(request(1, 3, max_tokens=6))
    for _ in range(5):
        commit(brain, plan(brain))
    last = plan(brain)
    assert rows(last) == [(0, 1), (1, 1)]
    assert brain.plan() is None, "it pauses for want of a block"
    assert brain.totals.num_preemptions_P[0] == 0
    assert commit(brain, last).finished == ((1, FinishReason.LENGTH),)
    assert rows(plan(brain)) == [(0, 1)]


def test_who_comes_in_leaves_a_block_for_each_that_runs() -> None:
    brain = scheduler(num_blocks=4, is_prefix_caching=False)
    for request_id in range(2):
        brain.add(request(request_id, 7, max_tokens=8))
    step = plan(brain)
    assert rows(step) == [(0, 7)], "the other would have to give way two steps later"
    commit(brain, step)
    brain.cancel([0])
    assert rows(plan(brain)) == [(0, 7)]


def test_a_request_can_be_cancelled_at_any_moment() -> None:
    brain = scheduler(max_num_seqs=2)
    for request_id in range(3):
        brain.add(request(request_id, 4))
    first, second = plan(brain), plan(brain)
    assert brain.cancel([2, 0, 0, 99]) == [2, 0]
    assert tokens_by_id(commit(brain, first, [20, 21])) == {1: 21}
    third = plan(brain)
    assert as_ints(sent(third).dropped).tolist() == [0]
    assert tokens_by_id(commit(brain, second, [22, 23])) == {1: 23}
    assert tokens_by_id(commit(brain, third)) == {1: TOKEN}
    assert brain.cancel([1]) == [1]
    assert brain.replicas[0].pool.num_free == brain.replicas[0].pool.num_blocks


def test_a_row_of_a_slot_with_a_new_tenant_is_dropped() -> None:
    brain = scheduler(max_num_seqs=1)
    brain.add(request(0, 4))
    first, second = plan(brain), plan(brain)
    brain.cancel([0])
    brain.add(request(0, 4))
    third = plan(brain)
    assert rows(third) == [(0, 4)]
    for step in (first, second):
        assert commit(brain, step).tokens == b""
    assert tokens_by_id(commit(brain, third)) == {0: TOKEN}


def test_logprobs_follow_their_tokens() -> None:
    brain = scheduler()
    for request_id in range(3):
        brain.add(request(request_id, 4))
    step = plan(brain)
    brain.cancel([0])
    columns = LogprobColumns(
        entries=ints([0, 2]),
        chosen=np.array([-0.5, -2.5], dtype=np.float32).tobytes(),
        width=2,
        top_ids=ints([1, 2, 3, 4]),
        top_logprobs=np.array([-1, -2, -3, -4], dtype=np.float32).tobytes(),
    )
    batch = brain.commit(step, [StepResult(step.step.number, ints([20, 21, 22]), columns)])
    assert list(tokens_by_id(batch)) == [1, 2]
    assert batch.logprobs is not None
    assert as_ints(batch.logprobs.entries).tolist() == [1]
    assert as_floats(batch.logprobs.chosen).tolist() == [-2.5]
    assert as_ints(batch.logprobs.top_ids).tolist() == [3, 4]
    assert as_floats(batch.logprobs.top_logprobs).tolist() == [-3.0, -4.0]


def test_logprobs_of_dropped_rows_alone_are_none() -> None:
    brain = scheduler()
    brain.add(request(0, 4))
    step = plan(brain)
    brain.cancel([0])
    columns = LogprobColumns(ints([0]), np.float32([-1]).tobytes(), 0, b"", b"")
    assert brain.commit(step, [StepResult(step.step.number, ints([20]), columns)]).logprobs is None


def test_many_end_tokens() -> None:
    brain = scheduler()
    brain.add(request(0, 4))
    brain.add(request(1, 4, stop_token_ids=tuple(range(200, 264))))
    assert commit(brain, plan(brain), [263, 263]).finished == ((1, FinishReason.STOP),)
    assert commit(brain, plan(brain), [EOS]).finished == ((0, FinishReason.STOP),)
    for request_id in (2, 3):
        brain.add(request(request_id, 4))
    step = plan(brain)
    assert sorted(slot for slot, _ in rows(step)) == [0, 1]
    assert commit(brain, step, [263, 263]).finished == (), "the end tokens of who had the slot before are forgotten"
