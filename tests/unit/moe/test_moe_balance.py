"""Which ranks have which experts: no expert is lost, no rank is worse off, and weights arrive where they belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.collectives.group import Group
from phalanx.config import Config
from phalanx.engine.balancing import Balancing
from phalanx.errors import ConfigError
from phalanx.executor.pending import Pending
from phalanx.models.packed import can_pack
from phalanx.moe.balance import MIN_GAIN, first_placement, rank_loads, rebalance
from phalanx.moe.copies import Copies, ExpertWeights, PlainWeights, exchange
from phalanx.moe.expert_products import ExpertLinear
from phalanx.protocol.client import BalanceStats
from phalanx.protocol.columns import as_ints
from phalanx.protocol.worker import CommandBody, ExpertLoads, LayerLoad, MeasureExperts, MoveExperts, ReplyBody
from phalanx.testing.thread_group import run_ranks
from phalanx.topology.grid import Grid
from phalanx.topology.sharding import ExpertShare

CPU = torch.device("cpu")


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Loads, ranks, and redundant experts that make as many physical ones for each rank, each expert once a rank."""
    num_ranks, num_each = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_physical = num_ranks * num_each
    num_experts = draw(st.integers(max(num_ranks, num_each), num_physical)) if num_each > 1 else num_ranks
    loads = draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    return loads, num_ranks, num_physical - num_experts


@settings(max_examples=300, deadline=None)
@given(layers(), st.data())
def test_placements_hold_every_expert_and_are_never_worse(
    layer: tuple[list[int], int, int], data: st.DataObject
) -> None:
    loads, num_ranks, num_redundant = layer
    placement = first_placement(len(loads), num_redundant)
    for _ in range(3):
        current, placement = placement, rebalance(loads, placement, num_ranks)
        assert set(placement) == set(range(len(loads)))
        assert len(placement) == len(current) == len(loads) + num_redundant
        before, after = max(rank_loads(loads, current, num_ranks)), max(rank_loads(loads, placement, num_ranks))
        assert after < before * (1 - MIN_GAIN) or placement == current
        assert sum(rank_loads(loads, placement, num_ranks)) == pytest.approx(sum(loads))
        assert rebalance(loads, placement, num_ranks) == placement, "it comes to rest at once"
        loads = data.draw(st.permutations(loads))


def test_the_example_of_deepseek() -> None:
    """The first layer of the example in EPLB's README, and what the published code makes of it with one group."""
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    placement = rebalance(loads, first_placement(12, 4), 8)
    assert Counter(placement) == Counter([*range(12), 1, 4, 5, 10])
    assert sorted(rank_loads(loads, placement, 8)) == [95.5, 130.0, 130.5, 132.0, 134.0, 134.5, 138.0, 138.5]


def test_a_skew_is_evened_out() -> None:
    placement = rebalance([800, 0, 0, 0, 100, 0, 100, 0], first_placement(8, 4), 4)
    assert Counter(placement)[0] == 5
    assert max(rank_loads([800, 0, 0, 0, 100, 0, 100, 0], placement, 4)) <= 320


def test_experts_that_stay_with_their_rank_stay_in_their_place() -> None:
    placement = rebalance([10, 10, 0, 0, 1, 1], first_placement(6, 0), 3)
    assert sum(old != new for old, new in enumerate(placement)) == 2


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 9))
def test_tokens_take_the_copies_in_turn(layer: tuple[list[int], int, int], seed: int) -> None:
    loads, num_ranks, num_redundant = layer
    placement = rebalance(loads, first_placement(len(loads), num_redundant), num_ranks)
    copies = Copies(placement, len(loads), CPU)
    dice = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(24, len(loads), generator=dice).argsort(dim=1)[:, :3]
    physical_TK = copies.choose(experts_TK)
    assert torch.equal(torch.tensor(placement)[physical_TK], experts_TK)
    num_tokens = 5 * placement.count(0)
    chosen = copies.choose(torch.zeros(num_tokens, 1, dtype=torch.int32))[:, 0].tolist()
    assert Counter(chosen) == dict.fromkeys([i for i, expert in enumerate(placement) if expert == 0], 5)


def test_nothing_is_looked_up_where_every_expert_is_in_its_place() -> None:
    experts_TK = torch.tensor([[3, 1]])
    assert Copies(first_placement(4, 0), 4, CPU).choose(experts_TK) is experts_TK


@settings(max_examples=40, deadline=None)
@given(layers(), st.data())
def test_weights_follow_their_experts(layer: tuple[list[int], int, int], data: st.DataObject) -> None:
    loads, num_ranks, num_redundant = layer
    old = first_placement(len(loads), num_redundant)
    placements = [old, data.draw(st.permutations(old)), rebalance(loads, old, num_ranks), old]
    share = len(old) // num_ranks

    def held(placement: Sequence[int], rank: int) -> list[torch.Tensor]:
        mine = torch.tensor(placement[rank * share : (rank + 1) * share])
        return [mine[:, None, None].expand(-1, 3, 2).to(torch.bfloat16).contiguous(), mine[:, None].float()]

    def body(group: Group) -> None:
        matrices, vectors = held(old, group.rank)
        linear = ExpertLinear("linear", matrices, None, is_transposed=True)
        if group.rank % 2 and can_pack(matrices.dtype, CPU):  # both forms send the same
            linear.pack()
        weights: list[ExpertWeights] = [linear, PlainWeights(vectors)]
        for before, after in pairwise(placements):
            exchange(weights, before, after, group)
            for weight, expected in zip(weights, held(after, group.rank), strict=True):
                assert torch.equal(weight.read(range(share)), expected)

    run_ranks(num_ranks, body)


@pytest.mark.parametrize(("num_experts", "num_ranks", "num_redundant"), [(8, 3, 0), (8, 4, 3), (4, 2, 6)])
def test_redundant_experts_that_cannot_be(num_experts: int, num_ranks: int, num_redundant: int) -> None:
    with pytest.raises(ConfigError, match="num_redundant_experts: "):
        ExpertShare(0, num_ranks, num_redundant, is_even=True).span(num_experts)


@pytest.mark.parametrize("backend", ["allgather_reducescatter", "alltoall"])
def test_all_ranks_of_a_stage_are_in_one_group_where_experts_move(backend: Any) -> None:
    stays, moves = Grid(2, 2, 2, backend), Grid(2, 2, 2, backend, moves_experts=True)
    groups = {group.name: group.ranks for group in moves.groups()}
    assert (groups["ep@0"], groups["ep@1"]) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert set(stays.groups()) | {group for group in moves.groups() if group.name.startswith("ep@")} == set(
        moves.groups()
    )


def test_what_the_brain_makes_of_loads() -> None:
    """Of two stages, each with a layer, on two ranks each: 0 and 2, 1 and 3."""
    config = Config.build(
        model="m",
        data_parallel_size=2,
        pipeline_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        eplb_interval_steps=3,
    )
    executor = Ranks()
    balancing = Balancing(config, executor)
    executor.loads = [
        [("first", [40, 40, 0, 0])],
        [("last", [5, 5, 0, 0])],
        [("first", [0, 0, 10, 10])],
        [("last", [0, 0, 5, 5])],
    ]
    made = [balancing.before_step() for _ in range(6)]
    assert [move is not None for move in made] == [False, False, False, False, True, False]
    first, second = executor.bodies
    assert first == MeasureExperts()
    assert isinstance(second, MoveExperts)
    assert (second.layer, second.number, second.epoch) == ("first", 1, 1)
    placement = as_ints(second.placement).tolist()
    assert sorted(map(sorted, (placement[:2], placement[2:]))) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    assert balancing.stats == BalanceStats(measured=(80 + 10) / (50 + 10), expected=1.0, num_moves=1)
    for _ in range(4):  # the same totals again: nothing has come since
        balancing.before_step()
    assert executor.bodies[2:] == [MeasureExperts()]
    assert balancing.stats == BalanceStats(measured=1.0, expected=1.0, num_moves=1)


class Ranks:
    """Answers at once."""

    def __init__(self) -> None:
        self.bodies: list[CommandBody] = []
        self.loads: list[list[tuple[str, list[int]]]] = []

    def submit(
        self, body: CommandBody, *, ranks: Sequence[int] | None = None, deadline_s: float
    ) -> Pending[list[ReplyBody]]:
        self.bodies.append(body)
        pending: Pending[list[ReplyBody]] = Pending("loads", range(4), deadline_s, lambda *_: None, list)
        for rank, layers in enumerate(self.loads):
            found = [LayerLoad(name, np.asarray(counts, np.int64).tobytes()) for name, counts in layers]
            pending.resolve(rank, ExpertLoads(tuple(found)))
        return pending
