"""Several replicas planned together: who gets a request, and what those do that have none."""

from __future__ import annotations

from engine_brain_rig import Rig


def prompt(first: int, length: int = 9) -> list[int]:
    return [first] * length


def loads(rig: Rig) -> list[int]:
    return [stats.num_running + stats.num_waiting for stats in rig.brain.stats().replicas]


def test_requests_are_shared_out_evenly() -> None:
    rig = Rig(data_parallel_size=3)
    for first in range(7):
        rig.submit(prompt(10 + first), max_tokens=4)
    assert sorted(loads(rig)) == [2, 2, 3]
    rig.finish()


def test_a_replica_without_work_takes_part_with_nothing_to_compute() -> None:
    rig = Rig(data_parallel_size=3)
    rig.submit(prompt(10), max_tokens=4, ignore_eos=True)
    rig.finish()
    for number, step in enumerate(rig.executor.steps):
        assert [plan.step for plan in step.plans] == [number] * 3
        assert sorted(plan.shape.num_tokens > 0 for plan in step.plans) == [False, False, True]


def test_who_has_the_prefix_gets_the_request() -> None:
    rig = Rig(data_parallel_size=2, block_size=4)
    rig.submit(prompt(10), max_tokens=1)
    rig.submit(prompt(11), max_tokens=8, ignore_eos=True)
    while rig.clients[0].reason is None:
        rig.step()
    assert loads(rig) == [0, 1]
    again = rig.submit([*prompt(11, 8), 12], max_tokens=4, ignore_eos=True)  # the busier one has 8 of its tokens
    assert loads(rig) == [0, 2]
    rig.finish()
    assert rig.clients[again].num_cached == 8


def test_but_not_if_it_is_much_busier() -> None:
    rig = Rig(data_parallel_size=2, block_size=4, max_num_seqs=16, num_blocks=128)
    rig.submit(prompt(11), max_tokens=1)
    rig.finish()
    for _ in range(12):
        rig.submit(prompt(11), max_tokens=8)
    assert loads(rig) == [8, 4]
    rig.finish()


def test_a_cancelled_request_is_found_wherever_it_is() -> None:
    rig = Rig(data_parallel_size=2)
    ids = [rig.submit(prompt(10 + i), max_tokens=30, ignore_eos=True) for i in range(4)]
    rig.step()
    rig.brain.cancel(ids)
    rig.finish()
    assert all(len(client.output) <= 2 for client in rig.clients.values())
