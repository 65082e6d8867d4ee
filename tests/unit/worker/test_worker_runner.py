"""The runner over a model that can only be right if every token reached its place in the cache.

The model keeps token ids in its cache and reads a row's whole context back through the block tables. What comes next is
a function of that context, so a wrong position, cache slot, block table or token id changes the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.models.attention_batch import AttentionBatch
from phalanx.protocol.columns import as_floats, as_ints, ints
from phalanx.protocol.sampling import SamplingParams
from phalanx.protocol.worker import NO_TOKEN, NewRequest, Step, StepPlan, StepResult, StepShape
from phalanx.worker.runner import Runner
from phalanx.worker.stage import Stage

VOCAB = 64
BLOCK_SIZE = 4
NUM_BLOCKS = 40
MAX_MODEL_LEN = 48
NUM_SLOTS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN_TOKEN = 63
"""The fake model's logits are NaN after this token."""


def digest(context: Sequence[int]) -> int:
    value = 17
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    return value


def next_token(context: Sequence[int]) -> int:
    return digest(context) % (VOCAB - 1)


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeModel:
    """Hidden states are digests of the context; logits are 0 but for the token that comes next."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        self.cache = torch.full((NUM_BLOCKS, BLOCK_SIZE), -1, dtype=torch.int64)
        self.collectives: list[tuple[str, int]] = []
        self.batches: list[AttentionBatch] = []

    def hidden_states(
        self, token_ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        self.collectives.append(("hidden_states", len(token_ids_T)))
        self.batches.append(batch)
        assert batch.slots_T.unique().numel() == len(token_ids_T)
        assert batch.block_tables_RB.is_contiguous()
        self.cache.view(-1)[batch.slots_T.cpu()] = token_ids_T.cpu()
        digests = []
        starts = batch.query_starts_R1.tolist()
        for row, context_len in enumerate(batch.context_lens_R.tolist()):
            context = self.cache[batch.block_tables_RB[row].cpu().long()].flatten()[:context_len].tolist()
            num_tokens = starts[row + 1] - starts[row]
            first = context_len - num_tokens
            assert positions_T[starts[row] : starts[row + 1]].tolist() == list(range(first, context_len))
            assert -1 not in context
            digests += [
                math.nan if context[position] == NAN_TOKEN else float(digest(context[: position + 1]))
                for position in range(first, context_len)
            ]
        assert len(digests) == len(token_ids_T)
        return torch.tensor(digests, dtype=torch.float64, device=DEVICE)[:, None]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        self.collectives.append(("logits", len(hidden_RD)))
        logits_RV = torch.zeros(len(hidden_RD), VOCAB, device=DEVICE)
        is_number_R = ~hidden_RD[:, 0].isnan()
        next_R = hidden_RD[:, 0].nan_to_num().long() % (VOCAB - 1)
        logits_RV[torch.arange(len(hidden_RD)), next_R] = 10.0
        return logits_RV.masked_fill_(~is_number_R[:, None], math.nan)


@dataclass
class FakeGroup:
    """Rank 0's broadcasts wait in `sent` for the other ranks, which run afterwards."""

    rank: int = 0
    sent: list[Tensor] = field(default_factory=list)
    num_broadcasts: int = 0

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        assert src == 0
        self.num_broadcasts += 1
        if self.rank == 0:
            self.sent.append(x.clone())
            return x
        return x.copy_(self.sent.pop(0))


def new_runner(
    group: FakeGroup | None = None,
    model: FakeModel | EmbeddingModel | ConstantModel | None = None,
    *,
    upstream: FakeGroup | None = None,
    downstream: FakeGroup | None = None,
) -> Runner:
    return Runner(
        model or FakeModel(),  # type: ignore[arg-type]
        Stage(group or FakeGroup(), upstream, downstream),  # type: ignore[arg-type]
        max_num_seqs=NUM_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        device=DEVICE,
    )


def new(
    slot: int,
    token_ids: Sequence[int],
    blocks: Sequence[int],
    *,
    num_prompt: int | None = None,
    num_computed: int = 0,
    seed: int = 0,
    **sampling: Any,
) -> NewRequest:
    return NewRequest(
        slot=slot,
        token_ids=ints(token_ids),
        num_prompt=len(token_ids) if num_prompt is None else num_prompt,
        num_computed=num_computed,
        blocks=ints(blocks),
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        seed=seed,
        eos_token_ids=(),
    )


def plan(
    rows: Sequence[tuple[int, int]],
    num_samples: int,
    *,
    new: Sequence[NewRequest] = (),
    dropped: Sequence[int] = (),
    blocks: Sequence[tuple[int, int]] = (),
    told: Sequence[tuple[int, int]] = (),
    step: int = 0,
) -> StepPlan:
    return StepPlan(
        epoch=0,
        step=step,
        shape=StepShape(sum(count for _, count in rows), len(rows), num_samples),
        slots=ints([slot for slot, _ in rows]),
        num_tokens=ints([count for _, count in rows]),
        block_slots=ints([slot for slot, _ in blocks]),
        block_ids=ints([block for _, block in blocks]),
        dropped=ints(dropped),
        new=tuple(new),
        token_slots=ints([slot for slot, _ in told]),
        tokens=ints([token for _, token in told]),
    )


def run(runner: Runner, step: StepPlan) -> list[int]:
    return as_ints(runner.finish(runner.launch(Step((step,)))).tokens).tolist()


# ------------------------------------------------------------------------------ hand-made plans


def test_prefill_then_decode() -> None:
    runner, prompt = new_runner(), [3, 1, 4, 1, 5]
    expected = continuation(prompt, 6)
    assert run(runner, plan([(2, 5)], 1, new=[new(2, prompt, [7, 5])])) == expected[:1]
    for i in range(1, 6):
        blocks = [(2, 9)] if i == 4 else []
        assert run(runner, plan([(2, 1)], 1, blocks=blocks, step=i)) == [expected[i]]


def test_chunked_prefill_samples_only_at_its_end() -> None:
    runner, prompt = new_runner(), list(range(11))
    assert run(runner, plan([(0, 3)], 0, new=[new(0, prompt, [3])])) == []
    assert run(runner, plan([(0, 6)], 0, blocks=[(0, 2), (0, 8)])) == []
    assert run(runner, plan([(0, 1)], 0)) == []
    assert run(runner, plan([(0, 1)], 1)) == continuation(prompt, 1)


def test_mixed_rows_of_unequal_length() -> None:
    model = FakeModel()
    runner = new_runner(model=model)
    prompts = [[1, 2], [5, 6, 7], list(range(20, 29))]
    outputs = [continuation(prompt, 3) for prompt in prompts]
    first = run(runner, plan([(4, 2), (1, 3)], 2, new=[new(4, prompts[0], [0]), new(1, prompts[1], [1])]))
    assert first == [outputs[0][0], outputs[1][0]]
    second = run(runner, plan([(1, 1), (4, 1), (0, 9)], 3, new=[new(0, prompts[2], [4, 3, 2])]))
    assert second == [outputs[1][1], outputs[0][1], outputs[2][0]]
    batch = model.batches[-1]
    assert (batch.num_decodes, batch.max_query_len, batch.max_context_len) == (2, 9, 9)
    assert batch.query_starts_R1.tolist() == [0, 1, 2, 11]
    assert batch.context_lens_R.tolist() == [4, 3, 9]
    assert (batch.query_starts_R1.dtype, batch.block_tables_RB.dtype) == (torch.int32, torch.int32)
    third = run(runner, plan([(0, 1), (4, 1)], 2))
    assert third == [outputs[2][1], outputs[0][2]]


def test_a_slot_is_dropped_and_reused_in_one_plan() -> None:
    runner, prompt = new_runner(), [9, 9, 2]
    run(runner, plan([(3, 6)], 1, new=[new(3, range(6), [1, 2], presence_penalty=0.1)]))
    run(runner, plan([(3, 1)], 1))
    again = plan([(3, 3)], 1, dropped=[3], new=[new(3, prompt, [5], presence_penalty=0.1)])
    assert run(runner, again) == continuation(prompt, 1)
    assert run(runner, plan([(3, 1)], 1)) == continuation(prompt, 2)[1:]


def test_a_plan_may_only_drop() -> None:
    model, group = FakeModel(), FakeGroup()
    runner = new_runner(group, model)
    run(runner, plan([(0, 2)], 1, new=[new(0, [1, 2], [0])]))
    assert run(runner, plan([], 0, dropped=[0])) == []
    assert run(runner, plan([(0, 2)], 1, new=[new(0, [1, 2], [0])])) == continuation([1, 2], 1)
    assert model.collectives == [("hidden_states", 2), ("logits", 1)] * 2


def test_a_cached_prefix_is_not_computed_again() -> None:
    runner = new_runner()
    prefix = list(range(8))
    run(runner, plan([(0, 10)], 1, new=[new(0, [*prefix, 1, 1], [6, 4, 2])]))
    prompt = [*prefix, 2, 2, 2]
    assert run(runner, plan([(1, 3)], 1, new=[new(1, prompt, [6, 4, 9], num_computed=8)])) == continuation(prompt, 1)


def test_return_from_preemption() -> None:
    runner, prompt = new_runner(), [8, 8, 8]
    expected = continuation(prompt, 5)
    run(runner, plan([(0, 3)], 1, new=[new(0, prompt, [0])]))
    run(runner, plan([(0, 1)], 1))
    back = new(2, [*prompt, *expected[:2]], [5, 6], num_prompt=3)
    assert run(runner, plan([(2, 5)], 1, dropped=[0], new=[back])) == [expected[2]]
    assert run(runner, plan([(2, 1)], 1)) == [expected[3]]


def test_steps_are_launched_ahead_of_their_results() -> None:
    runner, prompt = new_runner(), [1, 2, 3]
    plans = [plan([(0, 3)], 1, new=[new(0, prompt, [0, 1])]), plan([(0, 1)], 1), plan([(0, 1)], 1)]
    flights = [runner.launch(Step((step,))) for step in plans]
    assert DEVICE.type == "cuda" or all(flight.is_ready() for flight in flights)
    tokens = [as_ints(runner.finish(flight).tokens).tolist()[0] for flight in flights]
    assert tokens == continuation(prompt, 3)


# ------------------------------------------------------------------------------ ranks


def test_other_ranks_take_the_tokens_of_rank_0_and_issue_the_same_collectives() -> None:
    sent: list[Tensor] = []
    groups, models = [FakeGroup(rank, sent) for rank in range(2)], [FakeModel() for _ in range(2)]
    runners = [new_runner(group, model) for group, model in zip(groups, models, strict=True)]
    request = new(0, [1, 2, 3, 4, 5], [0, 1], temperature=100.0, seed=6, logprobs=1)
    for step in (plan([(0, 4)], 0, new=[request]), plan([(0, 1)], 1), plan([(0, 1)], 1), plan([(0, 1)], 1)):
        first, second = (run(runner, step) for runner in runners)
        assert first == second
    assert models[0].collectives == models[1].collectives
    assert groups[0].num_broadcasts == groups[1].num_broadcasts == 3
    torch.testing.assert_close(models[0].cache, models[1].cache)


# ------------------------------------------------------------------------------ stages


class EmbeddingModel:
    """The first stage: its hidden states are the token ids."""

    vocab_size = VOCAB
    hidden_size = 1
    dtype = torch.float64

    def __init__(self) -> None:
        self.calls: list[int] = []

    def hidden_states(
        self, token_ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        assert token_ids_T.dtype == torch.int64
        self.calls.append(len(token_ids_T))
        return token_ids_T[:, None].double()


class LaterModel(FakeModel):
    """A stage that gets the token ids as hidden states, and computes all that there is to compute."""

    hidden_size = 1
    dtype = torch.float64

    def hidden_states(
        self, hidden_TD: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        assert hidden_TD.shape == (len(positions_T), 1)
        return super().hidden_states(hidden_TD[:, 0].long(), positions_T, batch)


class Pipeline:
    """Two stages of two ranks each, run one after the other; `launch` gives the output rank's flight."""

    def __init__(self) -> None:
        links: list[list[Tensor]] = [[], []]
        self.sent = links
        self.shared = [FakeGroup(rank) for rank in (0, 1, 0, 1)]
        self.links = [FakeGroup(end, links[tp_rank]) for end in (0, 1) for tp_rank in (0, 1)]
        self.models = [EmbeddingModel(), EmbeddingModel(), LaterModel(), LaterModel()]
        self.runners = [
            new_runner(
                self.shared[rank],
                self.models[rank],
                downstream=self.links[rank] if rank < 2 else None,
                upstream=self.links[rank] if rank >= 2 else None,
            )
            for rank in range(4)
        ]

    def run(self, step: StepPlan) -> list[int]:
        outcomes = [run(runner, step) for runner in self.runners]
        assert outcomes[0] == outcomes[1] == []
        assert set(outcomes[3]) <= {NO_TOKEN}, "only the output rank samples"
        return outcomes[2]


def test_stages_pass_hidden_states_on_and_the_last_samples() -> None:
    pipeline, prompt = Pipeline(), [3, 1, 4, 1, 5]
    expected = continuation(prompt, 3)
    request = new(2, prompt, [7, 5], temperature=100.0, top_k=1, frequency_penalty=0.1)
    assert pipeline.run(plan([(2, 3)], 0, new=[request])) == []
    assert pipeline.run(plan([(2, 2)], 1)) == expected[:1]
    assert pipeline.run(plan([(2, 1)], 1, told=[(2, expected[0])])) == expected[1:2]
    assert pipeline.run(plan([(2, 1)], 1, told=[(2, expected[1])])) == expected[2:]
    assert [link.num_broadcasts for link in pipeline.links] == [4] * 4
    assert [group.num_broadcasts for group in pipeline.shared] == [0] * 4, "tokens return through the brain"


def test_the_first_stage_runs_ahead_of_the_last() -> None:
    pipeline = Pipeline()
    plans = [plan([(slot, 2)], 1, new=[new(slot, [slot, 9], [slot])]) for slot in range(3)]
    for step in plans:
        for runner in pipeline.runners[:2]:
            run(runner, step)
    assert [len(sent) for sent in pipeline.sent] == [3, 3]
    outcomes = [run(pipeline.runners[2], step) for step in plans]
    assert outcomes == [continuation([slot, 9], 1) for slot in range(3)]


def test_a_step_without_tokens_passes_nothing_on() -> None:
    pipeline = Pipeline()
    pipeline.run(plan([(0, 2)], 1, new=[new(0, [1, 2], [0])]))
    assert pipeline.run(plan([], 0, dropped=[0])) == []
    assert [link.num_broadcasts for link in pipeline.links] == [1] * 4


@pytest.mark.parametrize(
    ("told", "complaint"), [((), "does not tell"), (((1, 5),), "of other rows"), (((0, 5), (1, 5)), "of other rows")]
)
def test_a_plan_that_tells_the_wrong_rows_is_an_assertion(told: list[tuple[int, int]], complaint: str) -> None:
    pipeline = Pipeline()
    pipeline.run(plan([(0, 2)], 1, new=[new(0, [1, 2], [0])]))
    with pytest.raises(AssertionError, match=complaint):
        pipeline.runners[0].launch(Step((plan([(0, 1)], 1, told=told),)))


# ------------------------------------------------------------------------------ outcomes


def test_logprobs_travel_as_columns() -> None:
    runner = new_runner()
    requests = [new(0, [1], [0]), new(1, [2], [1], logprobs=0), new(2, [3], [2], logprobs=2)]
    result = runner.finish(runner.launch(Step((plan([(0, 1), (1, 1), (2, 1)], 3, new=requests, step=7),))))
    assert isinstance(result, StepResult)
    assert result.step == 7
    columns = result.logprobs
    assert columns is not None
    assert as_ints(columns.entries).tolist() == [1, 2]
    assert columns.width == 2
    chosen = 10.0 - math.log(math.exp(10.0) + VOCAB - 1)
    assert as_floats(columns.chosen).tolist() == pytest.approx([chosen] * 2, abs=1e-5)
    ids, values = as_ints(columns.top_ids).reshape(2, 2), as_floats(columns.top_logprobs).reshape(2, 2)
    assert ids[:, 0].tolist() == [next_token([2]), next_token([3])]
    assert values[1].tolist() == pytest.approx([chosen, chosen - 10.0], abs=1e-5)


def test_nan_logits_cost_one_row_its_token_and_poison_no_later_step() -> None:
    runner = new_runner()
    requests = [new(1, [1], [0]), new(3, [NAN_TOKEN], [1]), new(4, [2], [2])]
    flight = runner.launch(Step((plan([(1, 1), (3, 1), (4, 1)], 3, new=requests, step=41),)))
    runner.launch(Step((plan([(3, 1)], 1, step=42),)))  # a GPU would have had this step before the error is known
    tokens = as_ints(runner.finish(flight).tokens).tolist()
    assert tokens == [next_token([1]), NO_TOKEN, next_token([2])]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (plan([(0, 1)], 0), "its shape says"),
        (plan([(0, 2)], 0), "nobody knows"),
        (plan([(1, 1)], 0), "nobody knows"),
        (plan([(0, 1)], 0, dropped=[0]), "nobody knows"),
        (plan([], 0, dropped=[1]), "which is free"),
        (plan([], 0, new=[new(0, [1], [3])]), "given twice"),
        (plan([], 0, blocks=[(0, NUM_BLOCKS)]), "no such block"),
        (plan([(2, 2), (0, 1)], 2, new=[new(2, [1, 2], [4])]), "one token come first"),
        (plan([(2, 5)], 1, new=[new(2, [1, 2, 3, 4, 5], [4])]), "too few blocks"),
    ],
)
def test_a_plan_against_the_contract_is_an_assertion(wrong: StepPlan, complaint: str) -> None:
    runner = new_runner()
    run(runner, plan([(0, 3)], 1, new=[new(0, [1, 2, 3], [0])]))
    with pytest.raises(AssertionError, match=complaint):
        runner.launch(Step((wrong,)))


# ------------------------------------------------------------------------------ a GPU is not waited for


class ConstantModel:
    """Computes nothing that a GPU would be waited for."""

    vocab_size = 300

    def __init__(self) -> None:
        self.logits_RV = torch.randn(NUM_SLOTS, self.vocab_size, device=DEVICE)

    def hidden_states(
        self, token_ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        return token_ids_T[:, None].float()

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.logits_RV[: len(hidden_RD)].clone()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_launch_never_waits_for_the_gpu() -> None:
    runner = new_runner(model=ConstantModel())
    requests = [
        new(0, [1, 2], [0]),
        new(1, [1, 2], [1], temperature=1.0, top_p=0.9, min_p=0.01, logprobs=3),
        new(2, [1, 2], [2], temperature=1.0, top_k=5, repetition_penalty=1.5, frequency_penalty=0.5),
        new(3, [1, 2], [3], temperature=1.0),
        new(4, [1, 2], [4], min_tokens=3, stop_token_ids=(4, 5)),
    ]
    flights = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flights.append(runner.launch(Step((plan([(i, 2) for i in range(5)], 5, new=requests),))))
        flights += [runner.launch(Step((plan([(i, 1) for i in range(5)], 5),))) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(as_ints(runner.finish(flight).tokens)) == 5 for flight in flights)


# ------------------------------------------------------------------------------ any order of events


@dataclass
class Request:
    prompt: list[int]
    tokens: list[int]
    """All that are known."""
    num_computed: int
    blocks: list[int]
    num_given: int = 0


class Brain:
    """A scheduler of random choices: admits, computes chunks, decodes, drops and preempts."""

    def __init__(self, data: st.DataObject, *, tells_tokens: bool = False) -> None:
        self.draw = data.draw
        self.tells_tokens = tells_tokens
        self.free_blocks = list(range(NUM_BLOCKS))
        self.running: dict[int, Request] = {}
        self.preempted: list[Request] = []

    def plan(self, step: int) -> StepPlan:
        dropped = [slot for slot in list(self.running) if self.draw(st.integers(0, 9)) == 0]
        for slot in dropped:
            request = self.running.pop(slot)
            self.free_blocks += request.blocks
            if self.draw(st.booleans()):
                self.preempted.append(Request(request.prompt, request.tokens, 0, []))
        requests = [self._admit(slot) for slot in range(NUM_SLOTS) if slot not in self.running and self._may_admit()]
        rows, blocks = [], []
        for slot, request in self.running.items():
            missing = len(request.tokens) - request.num_computed
            count = self.draw(st.sampled_from([0, 1, missing, self.draw(st.integers(1, missing))]))
            short = -(-(request.num_computed + count) // BLOCK_SIZE) - len(request.blocks)
            if count == 0 or short > len(self.free_blocks) or len(request.tokens) >= MAX_MODEL_LEN:
                continue
            grown = [self.free_blocks.pop() for _ in range(short)]
            request.blocks += grown
            blocks += [(slot, block) for block in grown]
            rows.append((slot, count))
        rows.sort(key=lambda row: row[1] > 1)
        num_samples = sum(
            self.running[slot].num_computed + count == len(self.running[slot].tokens) for slot, count in rows
        )
        told = [
            (slot, request.tokens[request.num_computed])
            for slot, request in ((slot, self.running[slot]) for slot, _ in rows if self.tells_tokens)
            if request.num_computed >= request.num_given
        ]
        return plan(rows, num_samples, new=requests, dropped=dropped, blocks=blocks, told=told, step=step)

    def _may_admit(self) -> bool:
        return len(self.free_blocks) > 4 and self.draw(st.booleans())

    def _admit(self, slot: int) -> NewRequest:
        if self.preempted and self.draw(st.booleans()):
            request = self.preempted.pop()
        else:
            prompt = self.draw(st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=14))
            request = Request(prompt, list(prompt), 0, [])
        request.blocks = [self.free_blocks.pop() for _ in range(self.draw(st.integers(0, 1)))]
        request.num_given = len(request.tokens)
        self.running[slot] = request
        return new(slot, request.tokens, request.blocks, num_prompt=len(request.prompt))

    def commit(self, step: StepPlan, result: list[int]) -> None:
        tokens = iter(result)
        for slot, count in zip(as_ints(step.slots).tolist(), as_ints(step.num_tokens).tolist(), strict=True):
            request = self.running[slot]
            request.num_computed += count
            if request.num_computed == len(request.tokens):
                token = next(tokens)
                assert token == next_token(request.tokens)
                request.tokens.append(token)
        assert next(tokens, None) is None


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_order_of_events(data: st.DataObject) -> None:
    brain, runner = Brain(data), new_runner()
    for step in range(data.draw(st.integers(1, 20))):
        made = brain.plan(step)
        brain.commit(made, run(runner, made))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_order_of_events_in_a_pipeline(data: st.DataObject) -> None:
    brain, pipeline = Brain(data, tells_tokens=True), Pipeline()
    for step in range(data.draw(st.integers(1, 20))):
        made = brain.plan(step)
        brain.commit(made, pipeline.run(made))


def test_cache_slots_of_a_large_block_number_do_not_wrap() -> None:
    """block * block_size passes 2**31 on a large GPU."""
    from phalanx.worker.inputs import StepInputs
    from phalanx.worker.slots import SlotTable

    table = SlotTable(max_num_seqs=1, max_model_len=32, block_size=16, num_blocks=2**28)
    step = plan([(0, 2)], 1, new=[new(0, [1, 2], [2**28 - 1])])
    table.apply(step)
    inputs = StepInputs.of(step, table.advance(step), table)
    assert inputs.cache_slots_T.tolist() == [2**32 - 16, 2**32 - 15]
    assert inputs.cache_slots_T.dtype == np.int64
