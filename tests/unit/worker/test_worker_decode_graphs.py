"""Decode steps over fixed memory, padded: what graphs do, with the work run again in place of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from test_worker_runner import (
    BLOCK_SIZE,
    DEVICE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    NUM_SLOTS,
    FakeGroup,
    FakeModel,
    continuation,
    new,
    plan,
    run,
)
from torch import Tensor

from phalanx.collectives.descriptor import Descriptor
from phalanx.collectives.journaled import CapturedCollectives, JournaledGroup
from phalanx.config import Config
from phalanx.ledger.group_notes import group_notes
from phalanx.ledger.journal import Journal
from phalanx.ledger.journal_layout import JOURNAL_BYTES
from phalanx.ledger.journal_reader import read
from phalanx.ledger.record import Kind
from phalanx.models.attention_batch import AttentionBatch
from phalanx.protocol.worker import Step, StepShape
from phalanx.testing.thread_group import run_ranks
from phalanx.worker.decode_graphs import Capture, DecodeGraphs
from phalanx.worker.graph_sizes import can_have_graphs, graph_sizes, size_for
from phalanx.worker.runner import Runner
from phalanx.worker.stage import Stage

SIZES = (1, 2, 4)


class GraphModel(FakeModel):
    """Reads rows as the fake model does, each of one token; rows of padding may share a place in the cache."""

    hidden_size = 1
    dtype = torch.float64
    device = DEVICE

    def __init__(self, *, is_first: bool = True, is_last: bool = True) -> None:
        super().__init__()
        self.cache = torch.full((NUM_BLOCKS + 1, BLOCK_SIZE), -1, dtype=torch.int64)
        self.is_first, self.is_last = is_first, is_last
        self.num_tokens: list[list[int]] = []

    def hidden_states(
        self, inputs: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        self.num_tokens.append(list(num_tokens))
        if not self.is_last:
            self.collectives.append(("hidden_states", len(inputs)))
            return inputs[:, None].double()
        token_ids_T = inputs if self.is_first else inputs[:, 0].long()
        if batch.max_query_len > 1:
            return super().hidden_states(token_ids_T, positions_T, batch)
        own = batch.slots_T < NUM_BLOCKS * BLOCK_SIZE
        num_own = int(own.sum())
        assert own[:num_own].all(), "padding comes last"
        hidden_RD = super().hidden_states(
            token_ids_T[:num_own],
            positions_T[:num_own],
            AttentionBatch(
                query_starts_R1=batch.query_starts_R1[: num_own + 1],
                context_lens_R=batch.context_lens_R[:num_own],
                block_tables_RB=batch.block_tables_RB[:num_own],
                slots_T=batch.slots_T[:num_own],
                max_query_len=1,
                max_context_len=batch.max_context_len,
                num_decodes=num_own,
                block_size=BLOCK_SIZE,
            ),
        )
        assert (batch.context_lens_R[num_own:] == 1).all()
        self.collectives[-1] = ("hidden_states", len(inputs))
        return torch.cat([hidden_RD, hidden_RD.new_zeros(len(inputs) - num_own, 1)])


def again(work: Callable[[], None]) -> Callable[[], None]:
    return work


def new_runner(
    model: GraphModel,
    num_replicas: int = 1,
    replica: int = 0,
    capture: Capture = again,
    captured: Sequence[int] = SIZES,
    **links: FakeGroup,
) -> Runner:
    graphs = DecodeGraphs(
        model,  # type: ignore[arg-type]
        capture,
        [],
        sizes=SIZES,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        null_block=NUM_BLOCKS,
        num_replicas=num_replicas,
    )
    for size in reversed(captured):
        graphs.capture(size)
    model.collectives.clear()
    model.num_tokens.clear()
    return Runner(
        model,  # type: ignore[arg-type]
        Stage(FakeGroup(), **links),  # type: ignore[arg-type]
        max_num_seqs=NUM_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        device=DEVICE,
        replica=replica,
        graphs=graphs,
    )


def test_decode_steps_are_padded_and_prompts_are_not() -> None:
    model = GraphModel()
    runner = new_runner(model)
    prompts = [[1, 2], [5, 6, 7], list(range(20, 29))]
    outputs = [continuation(prompt, 6) for prompt in prompts]
    requests = [new(4, prompts[0], [0, 5]), new(1, prompts[1], [1, 6]), new(0, prompts[2], [4, 3, 2, 7])]
    first = run(runner, plan([(4, 2), (1, 3), (0, 9)], 3, new=requests))
    assert first == [output[0] for output in outputs]
    for i in range(1, 4):
        assert run(runner, plan([(4, 1), (1, 1), (0, 1)], 3, step=i)) == [output[i] for output in outputs]
    assert run(runner, plan([(0, 1), (4, 1)], 2, dropped=[1])) == [outputs[2][4], outputs[0][4]]
    assert run(runner, plan([(0, 1)], 1, dropped=[4])) == [outputs[2][5]]
    padded = [count for name, count in model.collectives if name == "hidden_states"]
    assert padded == [14, 4, 4, 4, 2, 1]
    assert [count for name, count in model.collectives if name == "logits"] == [3, 4, 4, 4, 2, 1]


def test_a_rehearsal_replays_each_graph_and_writes_to_nobodys_block_alone() -> None:
    model = GraphModel()
    runner = new_runner(model)
    runner.warm_up(1)
    assert [count for name, count in model.collectives if name == "hidden_states"] == [1, *SIZES]
    assert bool((model.cache[:NUM_BLOCKS] == -1).all())
    assert run(runner, plan([(0, 2)], 1, new=[new(0, [3, 1], [0])])) == continuation([3, 1], 1)


def test_one_that_is_not_captured_yet_is_by_the_first_step_that_needs_it() -> None:
    """Which computes its rows before."""
    model, sizes = GraphModel(), []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        sizes.append(model.collectives[-1][1])
        return work

    runner = new_runner(model, capture=capture, captured=SIZES[-1:])
    runner.warm_up(1)
    assert [count for name, count in model.collectives if name == "hidden_states"] == [1, 4], "none is made for it"
    prompts = [[slot, 3] for slot in range(3)]
    run(runner, plan([(s, 2) for s in range(3)], 3, new=[new(s, prompts[s], [s, s + 4]) for s in range(3)]))
    for i, num_rows in enumerate((3, 2, 2, 1, 1)):
        expected = [continuation(prompt, i + 2)[-1] for prompt in prompts[:num_rows]]
        assert run(runner, plan([(s, 1) for s in range(num_rows)], num_rows, step=i)) == expected
    assert sizes == [4, 2, 1]


def test_a_chunk_of_one_token_samples_nothing() -> None:
    runner = new_runner(GraphModel())
    short, long = [3, 1], list(range(11))
    run(runner, plan([(0, 2), (1, 9)], 1, new=[new(0, short, [0]), new(1, long, [1, 2, 3])]))
    assert run(runner, plan([(1, 1), (0, 1)], 1)) == continuation(short, 2)[1:]
    assert run(runner, plan([(1, 1), (0, 1)], 2)) == [continuation(long, 1)[0], continuation(short, 3)[2]]


def test_more_rows_than_the_largest_graph_run_without() -> None:
    model = GraphModel()
    runner = new_runner(model)
    prompts = [[slot, 3] for slot in range(5)]
    run(runner, plan([(s, 2) for s in range(5)], 5, new=[new(s, prompts[s], [s]) for s in range(5)]))
    assert run(runner, plan([(s, 1) for s in range(5)], 5)) == [continuation(prompt, 2)[1] for prompt in prompts]
    assert model.collectives[-2:] == [("hidden_states", 5), ("logits", 5)]


@pytest.mark.parametrize("captured", [SIZES, SIZES[:1]], ids=["all captured", "the smallest captured"])
def test_all_replicas_pad_alike_and_one_without_a_token_too(captured: Sequence[int]) -> None:
    models = [GraphModel(), GraphModel()]
    runners = [new_runner(model, 2, replica, captured=captured) for replica, model in enumerate(models)]
    prompts = [[slot, 3] for slot in range(3)]
    busy = plan([(s, 2) for s in range(3)], 3, new=[new(s, prompts[s], [s]) for s in range(3)])
    for runner in runners:
        runner.launch(Step((busy, plan([], 0))))
    step = Step((plan([(s, 1) for s in range(3)], 3), plan([], 0)))
    flights = [runner.launch(step) for runner in runners]
    assert flights[0].tokens_S.tolist() == [continuation(prompt, 2)[1] for prompt in prompts]
    assert flights[1].tokens_S.tolist() == []
    assert [model.num_tokens[-1] for model in models] == [[4, 4], [4, 4]]
    assert [model.collectives[-2:] for model in models] == [[("hidden_states", 4), ("logits", 4)]] * 2


@pytest.mark.parametrize("captured", [SIZES, SIZES[:1]], ids=["all captured", "the smallest captured"])
def test_stages_pass_on_the_rows_that_are_somebodys(captured: Sequence[int]) -> None:
    link: list[Tensor] = []
    up, down = FakeGroup(0, link), FakeGroup(1, link)
    first = new_runner(GraphModel(is_last=False), captured=captured, downstream=up)
    last = new_runner(GraphModel(is_first=False), captured=captured, upstream=down)
    prompts = [[slot, 3] for slot in range(3)]
    steps = [plan([(s, 2) for s in range(3)], 3, new=[new(s, prompts[s], [s]) for s in range(3)])]
    for i in (1, 2):
        told = [(s, continuation(prompts[s], i)[-1]) for s in range(3)]
        steps.append(plan([(s, 1) for s in range(3)], 3, told=told, step=i))
    for i, step in enumerate(steps):
        first.launch(Step((step,)))
        assert len(link[-1]) == (6 if i == 0 else 3)
        assert run(last, step) == [continuation(prompt, i + 1)[i] for prompt in prompts]


# ------------------------------------------------------------------------------ which graph


def test_sizes_end_with_the_most_rows() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(6) == (1, 2, 4, 6)
    assert graph_sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    assert graph_sizes(256)[-3:] == (224, 240, 256) and len(graph_sizes(256)) == 23
    assert graph_sizes(10_000)[-1] == 512


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([(1, 1)], 1),
        ([(3, 3)], 4),
        ([(4, 4), (0, 0)], 4),
        ([(0, 0), (2, 2)], 2),
        ([(5, 5), (1, 1)], None),
        ([(3, 2)], None),
        ([(1, 1), (3, 2)], None),
    ],
)
def test_the_graph_is_a_function_of_all_shapes(rows: list[tuple[int, int]], size: int | None) -> None:
    assert size_for([StepShape(num_tokens, num_rows, num_rows) for num_tokens, num_rows in rows], SIZES) == size


def test_who_has_graphs() -> None:
    def has(device: str = "cuda", **settings: object) -> bool:
        return can_have_graphs(Config.build(model="m", **settings), device)

    experts = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert has() and has(**experts)
    assert not has("cpu") and not has(cuda_graphs=False)
    assert not has(**experts, all2all_backend="alltoall") and not has(**experts, enable_eplb=True)


# ------------------------------------------------------------------------------ in the journal


def test_what_is_captured_is_noted_as_such_and_a_replay_is_one_collective() -> None:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    journal = Journal(memory, epoch=1)

    def live(group: JournaledGroup) -> None:
        x = torch.ones(2, 3)
        group.all_reduce(x)
        captured = CapturedCollectives([group])
        with captured.capturing():
            group.all_reduce(x)
            group.all_gather(x)
        for _ in range(2):
            with captured.replaying():
                pass
        group.barrier()

    run_ranks(1, lambda group: live(JournaledGroup(group, group_notes(1, journal, None))))
    entries = read(memory)
    kinds = [(record.kind, record.sequence) for record in entries.records]
    one, cap = Kind.COLLECTIVE, Kind.CAPTURED
    assert kinds == [(one, 1), (cap, 1), (cap, 2), (one, 2), (one, 3), (one, 4)]
    assert all(record.is_done for record in entries.records)
    reduce, gather = Descriptor("all_reduce", "float32", (2, 3)), Descriptor("all_gather", "float32", (2, 3), 1)
    graph = Descriptor.of_graph([reduce, gather])
    assert entries.texts[entries.records[3].digest] == str(graph)
    assert str(graph).startswith("a graph of 2 collectives of 2 rows (")
    assert Descriptor.decode(graph.encoded) == graph
    assert graph.digest not in (Descriptor.of_graph([gather, reduce]).digest, Descriptor.of_graph([reduce]).digest)
    assert entries.records[3].digest == entries.records[4].digest
    assert entries.sequences[1] == 4


def test_a_group_without_a_part_in_a_graph_notes_no_replay() -> None:
    memory = memoryview(bytearray(JOURNAL_BYTES))
    journal = Journal(memory, epoch=1)

    def live(group: JournaledGroup) -> None:
        captured = CapturedCollectives([group])
        with captured.capturing():
            pass
        with captured.replaying():
            pass

    run_ranks(1, lambda group: live(JournaledGroup(group, group_notes(1, journal, None))))
    assert read(memory).records == ()
