"""A brain over real runners and samplers: sampling goes on exactly when others take their place.

The model keeps token ids in its cache, and its logits follow from a row's whole context by whole numbers: two runs can
be compared to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.config import Config
from phalanx.engine.brain import Brain
from phalanx.models.attention_batch import AttentionBatch
from phalanx.protocol.client import Submit
from phalanx.protocol.columns import as_floats, as_ints, ints
from phalanx.protocol.sampling import FinishReason, SamplingParams
from phalanx.protocol.worker import FIRST_EPOCH, Step, StepResult
from phalanx.testing.simulated_worker import Answered
from phalanx.worker.runner import Runner
from phalanx.worker.stage import Stage

VOCAB = 40
BLOCK_SIZE = 4
NUM_BLOCKS = 24
MAX_MODEL_LEN = 48
MAX_NUM_SEQS = 4
EOS = (7,)
UNKNOWN = -1

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 12, "seed": 5, "logprobs": 3},
    {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logprobs": 1},
    {"temperature": 1.2, "seed": 2, "repetition_penalty": 1.3, "min_tokens": 18, "ignore_eos": False},
    {"temperature": 1.0, "min_p": 0.05, "seed": 9, "stop_token_ids": (3,), "min_tokens": 6, "logprobs": 0},
]


class Model:
    """Hidden states are digests of the context."""

    vocab_size = VOCAB
    hidden_size = 1
    dtype = torch.float64

    def __init__(self, cache: Tensor) -> None:
        self.cache = cache

    def hidden_states(
        self, inputs_T: Tensor, positions_T: Tensor, batch: AttentionBatch, num_tokens: Sequence[int] = ()
    ) -> Tensor:
        if inputs_T.dim() == 2:
            return inputs_T  # of the stage before
        self.cache.view(-1)[batch.slots_T] = inputs_T
        starts, digests = batch.query_starts_R1.tolist(), []
        for row, context_len in enumerate(batch.context_lens_R.tolist()):
            context = self.cache[batch.block_tables_RB[row].long()].flatten()[:context_len].tolist()
            assert UNKNOWN not in context
            value = 17
            for position, token in enumerate(context):
                value = (value * 31 + token + 1) % 1_000_003
                if position >= context_len - (starts[row + 1] - starts[row]):
                    digests.append(float(value))
        return torch.tensor(digests, dtype=torch.float64)[:, None]

    def logits(self, hidden_RD: Tensor) -> Tensor:
        mixed_RV = hidden_RD.long() * 2_654_435_761 + torch.arange(VOCAB) * 40_503_001
        return (mixed_RV % 1009).float() / 256


class Link:
    """Between two stages in one thread, which call it by turns."""

    def __init__(self) -> None:
        self._sent: Tensor | None = None

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        if self._sent is None:
            self._sent = x.clone()
        else:
            x.copy_(self._sent)
            self._sent = None
        return x


class Runners:
    """One rank, or one of each of two stages."""

    def __init__(self, num_stages: int, caches: Sequence[Tensor]) -> None:
        alone, link = SingleGroup(GroupSpec("alone", "single", (0,), FIRST_EPOCH, 1.0, 1.0)), Link()
        stages = [Stage(alone)] if num_stages == 1 else [Stage(alone, downstream=link), Stage(alone, upstream=link)]  # type: ignore[arg-type]
        self.caches = caches
        self._runners = [
            Runner(
                Model(cache),  # type: ignore[arg-type]
                stage,
                max_num_seqs=MAX_NUM_SEQS,
                max_model_len=MAX_MODEL_LEN,
                block_size=BLOCK_SIZE,
                num_blocks=NUM_BLOCKS,
                device=torch.device("cpu"),
            )
            for stage, cache in zip(stages, caches, strict=True)
        ]

    def step(self, step: Step) -> Answered:
        result: StepResult | None = None
        for runner in self._runners:
            result = runner.finish(runner.launch(step))
        assert result is not None
        return Answered((result,))


def empty_caches(num_stages: int) -> list[Tensor]:
    return [torch.full((NUM_BLOCKS, BLOCK_SIZE), UNKNOWN, dtype=torch.int64) for _ in range(num_stages)]


@dataclass
class Line:
    """The brain's executor, whose runners can be replaced."""

    runners: Runners

    def step(self, step: Step) -> Answered:
        return self.runners.step(step)


@dataclass
class Stream:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[int], list[float]]] = field(default_factory=list)
    reason: FinishReason | None = None


def serve(num_stages: int, *, rewind_every: int | None, keeps_cache: bool = True) -> list[Stream]:
    """Requests that come in one after the other; `rewind_every` so many turns all runners are replaced."""
    line = Line(Runners(num_stages, empty_caches(num_stages)))
    config = Config.build(
        model="fake",
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=8,
        pipeline_parallel_size=num_stages,
    )
    brain = Brain(config, line, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, eos_token_ids=EOS)
    streams = [Stream() for _ in SAMPLINGS]
    turn = num_submitted = 0
    while num_submitted < len(SAMPLINGS) or brain.has_work():
        if turn % 4 == 0 and num_submitted < len(SAMPLINGS):
            prompt = [10, 11, 12, 13, 14, *range(20, 21 + 2 * num_submitted)]
            sampling = SamplingParams(**{"ignore_eos": True, "max_tokens": 24, **SAMPLINGS[num_submitted]})  # type: ignore[arg-type]
            brain.submit(Submit(num_submitted, ints(prompt), sampling))
            num_submitted += 1
        turn += 1
        if rewind_every is not None and turn % rewind_every == 0:
            caches = line.runners.caches if keeps_cache else empty_caches(num_stages)
            line.runners = Runners(num_stages, caches)
            brain.rewind(1 + turn, keeps_cache=keeps_cache)
        take(brain, streams)
    return streams


def take(brain: Brain, streams: list[Stream]) -> None:
    batch = brain.step()
    if batch is None:
        return
    ids = np.frombuffer(batch.request_ids, dtype=np.int64).tolist()
    for request_id, token in zip(ids, as_ints(batch.tokens).tolist(), strict=True):
        streams[request_id].tokens.append(token)
    for request_id, reason in batch.finished:
        streams[request_id].reason = reason
    if (columns := batch.logprobs) is not None:
        entries = as_ints(columns.entries).tolist()
        top_ids = as_ints(columns.top_ids).reshape(len(entries), columns.width)
        top_logprobs = as_floats(columns.top_logprobs).reshape(len(entries), columns.width)
        for entry, chosen, one_ids, one_logprobs in zip(
            entries, as_floats(columns.chosen).tolist(), top_ids, top_logprobs, strict=True
        ):
            request_id = ids[entry]
            width = SAMPLINGS[request_id]["logprobs"]
            assert isinstance(width, int)
            streams[request_id].logprobs.append((chosen, one_ids[:width].tolist(), one_logprobs[:width].tolist()))


@pytest.fixture(scope="module")
def undisturbed() -> list[Stream]:
    return serve(1, rewind_every=None)


def test_there_is_something_to_compare(undisturbed: list[Stream]) -> None:
    assert all(len(stream.tokens) >= 6 for stream in undisturbed)
    assert {stream.reason for stream in undisturbed} == {FinishReason.LENGTH, FinishReason.STOP}
    assert [len(stream.logprobs) > 0 for stream in undisturbed] == [False, False, True, True, False, True]


@pytest.mark.parametrize("keeps_cache", [True, False])
@pytest.mark.parametrize(("num_stages", "rewind_every"), [(1, 2), (1, 5), (2, 3)])
def test_every_stream_is_the_same_to_the_last_logprob(
    undisturbed: list[Stream], num_stages: int, rewind_every: int, keeps_cache: bool
) -> None:
    if not keeps_cache:
        rewind_every *= 4  # or no prompt would be computed between two of them
    assert serve(num_stages, rewind_every=rewind_every, keeps_cache=keeps_cache) == undisturbed
