"""A brain that is held, admits no more, or has to compute everything anew: nothing is lost, and nothing comes twice."""

from __future__ import annotations

import pytest
from engine_brain_rig import Rig

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def test_held_it_commits_what_is_under_way_and_plans_nothing() -> None:
    rig = Rig()
    first = rig.submit([1, 2, 3], max_tokens=8, **GREEDY)
    for _ in range(3):
        rig.step()
    rig.brain.hold()
    while rig.brain.has_work():
        rig.step()
    assert rig.brain.is_between_steps
    num_steps, num_tokens = len(rig.executor.steps), len(rig.clients[first].output)
    second = rig.submit([4, 5], max_tokens=2, **GREEDY)
    assert not rig.brain.has_work() and rig.step() is None
    rig.brain.cancel([second])
    assert rig.brain.has_work(), "that it has ended is to be told"
    rig.step()
    assert (len(rig.executor.steps), len(rig.clients[first].output)) == (num_steps, num_tokens)
    rig.brain.go_on()
    rig.finish()


def test_who_came_before_runs_to_its_end_and_who_comes_then_waits() -> None:
    rig = Rig(max_num_seqs=2)
    before = [rig.submit([i, i + 1], max_tokens=4, **GREEDY) for i in range(4)]
    rig.step()
    rig.brain.admit_no_more()
    after = rig.submit([9, 9], max_tokens=4, **GREEDY)
    assert rig.brain.has_admitted
    while rig.brain.has_work():
        rig.step()
    assert not rig.brain.has_admitted
    assert all(rig.clients[request_id].reason is not None for request_id in before)
    assert not rig.clients[after].output
    rig.brain.go_on()
    rig.finish()
    assert rig.clients[after].reason is not None


@pytest.mark.parametrize("pipeline_parallel_size", [1, 2])
def test_everything_is_computed_anew(pipeline_parallel_size: int) -> None:
    rig = Rig(pipeline_parallel_size=pipeline_parallel_size)
    running = [rig.submit([1, 2, 3, 4, 5, 6, 7, 8, i], max_tokens=12, **GREEDY) for i in range(3)]
    for _ in range(6):
        rig.step()
    rig.brain.hold()
    while rig.brain.has_work():
        rig.step()
    num_computed = sum(len(rig.clients[one].prompt) + len(rig.clients[one].output) for one in running)
    rig.brain.recompute()
    assert rig.brain.stats().replicas[0].num_blocks_used == 0
    rig.brain.go_on()
    num_steps = len(rig.executor.steps)
    rig.finish()
    fresh = [new for step in rig.executor.steps[num_steps:] for plan in step.plans for new in plan.new]
    assert len(fresh) == 3
    assert all(new.num_computed == 0 for new in fresh[:1]), "what the cache had is forgotten"
    assert sum(len(new.token_ids) // 4 for new in fresh) == num_computed
