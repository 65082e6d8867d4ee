"""What is computed on workers of another number before they take over need not be computed after that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from engine_brain_rig import Rig

from phalanx.engine.ahead import FEW_TOKENS, MOST_PASSES, Ahead
from phalanx.protocol.columns import as_ints
from phalanx.protocol.worker import NewRequest
from phalanx.testing.simulated_worker import SimulatedExecutor

BLOCK_SIZE = 4


def running(num_requests: int, *, num_tokens: int, **settings: int) -> Rig:
    """A rig in the midst of so many requests."""
    rig = Rig(block_size=BLOCK_SIZE, max_num_seqs=8, num_blocks=128, max_model_len=256, **settings)  # type: ignore[arg-type]
    for first in range(num_requests):
        rig.submit(range(10 + first, 10 + first + num_tokens), max_tokens=60, ignore_eos=True)
    while min(len(client.output) for client in rig.clients.values()) < 3:
        rig.step()
    return rig


def brought(rig: Rig) -> list[NewRequest]:
    """By the next step."""
    rig.step()
    return [new for plan in rig.executor.steps[-2].plans + rig.executor.steps[-1].plans for new in plan.new]


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_only_the_rest_is_computed_after_the_switch(num_replicas: int) -> None:
    rig = running(4, num_tokens=30, data_parallel_size=2)
    rig.resize(data_parallel_size=num_replicas, num_passes=1)
    news = brought(rig)
    assert len(news) == 4
    for new in news:
        num_tokens = len(as_ints(new.token_ids))
        is_full = num_tokens % BLOCK_SIZE == 0  # then the block is others' as well
        assert num_tokens - new.num_computed == (BLOCK_SIZE if is_full else 1), "also of a block that is not full"
    rig.finish()


def test_what_has_come_meanwhile_takes_another_pass() -> None:
    rig = running(4, num_tokens=30)
    rig.resize(data_parallel_size=2, num_passes=2, meanwhile=rig.step)
    for new in brought(rig):
        num_tokens = len(as_ints(new.token_ids))
        assert num_tokens - new.num_computed <= 2 or num_tokens % BLOCK_SIZE == 0
    rig.finish()


def test_without_it_everything_is() -> None:
    rig = running(4, num_tokens=30)
    rig.resize(data_parallel_size=2)
    assert all(new.num_computed == 0 for new in brought(rig))
    rig.finish()


def test_totals_are_those_of_the_requests() -> None:
    rig = running(2, num_tokens=10, data_parallel_size=2)
    before = rig.brain.stats()
    rig.resize(data_parallel_size=2, num_passes=3)
    after = rig.brain.stats()
    assert [one.num_generated_tokens for one in after.replicas] == [one.num_generated_tokens for one in before.replicas]
    assert [one.num_steps for one in after.replicas] == [one.num_steps for one in before.replicas]


def test_a_cache_that_is_too_small_for_all() -> None:
    rig = running(6, num_tokens=40)
    rig.resize(num_blocks=70, num_passes=2)
    rig.finish()


def test_it_ends() -> None:
    """When little has come meanwhile, or no less than before; and also if there is always a little less."""
    rig = running(1, num_tokens=10)
    sizes = {"num_blocks": rig.num_blocks, "max_model_len": rig.max_model_len}

    def num_passes(growth: Callable[[int], int]) -> int:
        """When each pass finds so many tokens more, of two requests."""
        executor = SimulatedExecutor(*rig._make_workers())
        ahead = Ahead(rig.brain.scheduler_for(rig.config, rig.epoch, **sizes))
        count, num_tokens = 0, 40
        while not ahead.is_enough:
            ahead.add([100 * request + np.arange(num_tokens, dtype=np.int32) for request in range(2)])
            ahead.run(executor)
            count += 1
            num_tokens += growth(count)
        return count

    assert num_passes(lambda count: FEW_TOKENS) == 2
    assert num_passes(lambda count: 12) == 3, "the third had as many as the second"
    assert num_passes(lambda count: 12 - count) == MOST_PASSES
