"""Whatever routers say: every token gets what its experts make of it, in one sequence of collectives.

Shape suffixes: T a replica's tokens, K experts of a token, E experts, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phalanx.collectives.group import Group
from phalanx.moe.dispatcher import AllGatherReduceScatter, AllToAll, Dispatcher
from phalanx.moe.expert_products import install_products
from phalanx.moe.experts import share_out
from phalanx.testing.thread_group import ThreadGroup
from phalanx.topology.grid import Grid
from phalanx.topology.sharding import ExpertShare

NUM_EXPERTS = 7
WIDTH = 8  # rows of 16 bytes or a multiple: torch's grouped product takes no others
BACKENDS = ("allgather_reducescatter", "alltoall")

Record = tuple[str, str, tuple[int, ...]]


class Recorded:
    """A group that notes what it is asked for."""

    def __init__(self, group: ThreadGroup) -> None:
        self.records: list[Record] = []
        self._group = group

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._group, name)
        if name not in ("all_gather", "all_reduce", "reduce_scatter", "all_to_all"):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            result = found(*arguments, **named)
            assert self._group.last is not None
            self.records.append((self._group.last.operation, self._group.last.dtype, self._group.last.shape))
            return result

        return call


class Experts(nn.Module):
    """As transformers' modules without a gate: each expert is one matrix, and then another that changes nothing."""

    has_gate = has_bias = has_post_expert_norm = False
    is_transposed = True

    def __init__(self, weights_EDD: Tensor) -> None:
        super().__init__()
        self.num_experts = len(weights_EDD)
        self.act_fn = nn.Identity()
        self.up_proj = nn.Parameter(weights_EDD, requires_grad=False)
        self.down_proj = nn.Parameter(torch.eye(weights_EDD.shape[1]).expand_as(weights_EDD), requires_grad=False)

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        for expert in range(self.num_experts):
            weight_T = (weights_TK * (experts_TK == expert)).sum(dim=1)
            out_TD += weight_T[:, None] * (hidden_TD @ self.up_proj[expert])
        return out_TD


class Batch(NamedTuple):
    """One replica's tokens in a layer."""

    hidden_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor


class World(NamedTuple):
    """The groups of every rank, by rank."""

    shared: list[Recorded]
    outer: list[Recorded]
    """With the ranks of other replicas: peers, or all of the stage's."""

    @classmethod
    def of(cls, grid: Grid) -> World:
        groups: dict[int, list[Recorded]] = {rank: [] for rank in range(grid.world_size)}
        for members in grid.groups():
            made = ThreadGroup.make(len(members.ranks))
            for place, rank in enumerate(members.ranks):
                groups[rank].append(Recorded(made[place]))
        return cls([own[0] for own in groups.values()], [own[1] for own in groups.values()])

    def close(self) -> None:
        for group in (*self.shared, *self.outer):
            group.close()


def dispatcher_of(grid: Grid, world: World, rank: int) -> Dispatcher:
    outer: Group = world.outer[rank]  # type: ignore[assignment]
    shared: Group = world.shared[rank]  # type: ignore[assignment]
    if grid.all2all_backend == "alltoall":
        return AllToAll(outer, shared, NUM_EXPERTS)
    return AllGatherReduceScatter(outer, shared)


def run(grid: Grid, weights_EDD: Tensor, steps: list[list[Batch]]) -> tuple[list[list[Tensor]], World]:
    """What each rank has after each step, and what the groups were asked for."""
    world = World.of(grid)

    def body(rank: int) -> list[Tensor]:
        share = ExpertShare(grid.expert_rank(rank), grid.expert_parallel_size).span(NUM_EXPERTS)
        dispatcher = dispatcher_of(grid, world, rank)
        experts = Experts(weights_EDD[share.start : share.stop])
        install_products("experts", experts)
        share_out(experts, share, dispatcher)
        outputs = []
        for batches in steps:
            dispatcher.begin([len(batch.hidden_TD) for batch in batches])
            outputs.append(experts(*batches[grid.coordinates(rank).replica]))
        return outputs

    return in_threads(grid.world_size, body, world), world


def in_threads(size: int, body: Callable[[int], list[Tensor]], world: World) -> list[list[Tensor]]:
    def guarded(rank: int) -> list[Tensor]:
        try:
            return body(rank)
        except BaseException:
            world.close()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


grids = st.builds(Grid, st.integers(1, 3), st.just(1), st.integers(1, 3), st.sampled_from(BACKENDS)).filter(
    lambda grid: grid.expert_parallel_size <= NUM_EXPERTS
)
routers = st.sampled_from(["anywhere", "one expert", "last rank", "first rank", "alternating"])


@st.composite
def steps_of(draw: st.DrawFn) -> tuple[Grid, list[list[Batch]]]:
    grid = draw(grids)
    num_choices = draw(st.integers(1, 3))
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = [draw(st.integers(1, 9)) for _ in range(grid.data_parallel_size)]
        steps.append([batch(draw(routers), size, num_choices, draw(st.integers(0, 99))) for size in sizes])
    return grid, steps


def batch(router: str, num_tokens: int, num_choices: int, seed: int) -> Batch:
    dice = torch.Generator().manual_seed(seed)
    order_TE = torch.rand(num_tokens, NUM_EXPERTS, generator=dice).argsort(dim=1)
    if router == "one expert":
        order_TE = torch.arange(NUM_EXPERTS).roll(-(seed % NUM_EXPERTS)).expand(num_tokens, -1)
    elif router == "first rank":
        order_TE = torch.arange(NUM_EXPERTS).expand(num_tokens, -1)
    elif router == "last rank":
        order_TE = torch.arange(NUM_EXPERTS).flip(0).expand(num_tokens, -1)
    elif router == "alternating":
        order_TE = (torch.arange(NUM_EXPERTS) + 3 * torch.arange(num_tokens)[:, None]) % NUM_EXPERTS
    return Batch(
        torch.randn(num_tokens, WIDTH, generator=dice),
        order_TE[:, :num_choices].contiguous(),
        torch.rand(num_tokens, num_choices, generator=dice),
    )


@settings(max_examples=60, deadline=None)
@given(case=steps_of())
def test_every_token_gets_what_its_experts_make_of_it(case: tuple[Grid, list[list[Batch]]]) -> None:
    grid, steps = case
    weights_EDD = torch.randn(NUM_EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    outputs, world = run(grid, weights_EDD, steps)
    for rank, made in enumerate(outputs):
        replica = grid.coordinates(rank).replica
        for out_TD, batches in zip(made, steps, strict=True):
            expected_TD = Experts(weights_EDD)(*batches[replica])
            torch.testing.assert_close(out_TD, expected_TD, rtol=1e-5, atol=1e-5)
    for members in grid.groups():
        groups = world.shared if members.name.startswith("tp") else world.outer
        sequences = [groups[rank].records for rank in members.ranks]
        assert all(sequence == sequences[0] for sequence in sequences), members


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sequence_depends_on_the_numbers_of_tokens_alone(backend: Any) -> None:
    grid = Grid(2, 1, 2, backend)
    weights_EDD = torch.zeros(NUM_EXPERTS, WIDTH, WIDTH)
    sequences = []
    for router in ("anywhere", "one expert", "last rank"):
        _, world = run(grid, weights_EDD, [[batch(router, 5, 2, seed=1), batch(router, 1, 2, seed=2)]])
        sequences.append([group.records for group in (*world.shared, *world.outer)])
    assert sequences[0] == sequences[1] == sequences[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_collectives_of_a_layer(backend: Any) -> None:
    """What a rank sends, in the order of docs/decisions/0012: changing it changes what every rank must agree on."""
    _, world = run(
        Grid(2, 1, 2, backend), torch.zeros(NUM_EXPERTS, WIDTH, WIDTH), [[batch("anywhere", n, 2, n) for n in (3, 1)]]
    )
    float32, int32 = "float32", "int32"
    if backend == "alltoall":
        exchanged = [("all_to_all", int32, (1,)), ("all_to_all", float32, (WIDTH,)), ("all_to_all", int32, (4,))]
        assert world.outer[0].records == [*exchanged, ("all_to_all", float32, (WIDTH,))]
        assert world.shared[0].records == [("all_gather", float32, (2, WIDTH))]
    else:
        gathered = [("all_gather", float32, (3, WIDTH)), ("all_gather", int32, (3, 4))]
        assert world.outer[0].records == [*gathered, ("reduce_scatter", float32, (6, WIDTH))]
        assert world.shared[0].records == [("all_reduce", float32, (3, WIDTH))]
