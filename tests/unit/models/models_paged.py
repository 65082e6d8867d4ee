"""Runs sequences through a model step by step over a hand-made paged cache, whose unused memory holds NaN."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Names
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.models.attention_batch import AttentionBatch
from phalanx.models.checkpoint import resolve
from phalanx.models.model import CausalLM, WeightMemory, load_model
from phalanx.moe.dispatcher import Dispatcher
from phalanx.topology.sharding import ExpertShare, Span

CPU = torch.device("cpu")
NOWHERE = 1 << 20
"""A block id that no cache has: reading it is an error."""


@dataclass
class Sequence:
    """Token ids, of which `num_computed` are in the cache, in `blocks`."""

    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_computed


def nan_like(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def load(
    path: Path,
    group: Group,
    dtype: torch.dtype = torch.float32,
    layers: Span | None = None,
    *,
    pack: bool = True,
    experts: tuple[ExpertShare, Dispatcher] | None = None,
    dequantise: bool = True,
) -> CausalLM:
    """Memory that is given back holds NaN again."""
    tensors: dict[str, Tensor] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensors[name] = nan_like(name, shape, dtype)
        return tensors[name]

    def release(names: Names[str]) -> None:
        for name in names:
            tensors[name].fill_(math.nan)

    return load_model(
        resolve(str(path)),
        dtype=dtype,
        device=CPU,
        group=group,
        memory=WeightMemory(allocate, release=release if pack else None),
        on_progress=lambda done, total: None,
        layers=layers,
        experts=experts,
        dequantise=dequantise,
    )


class Stages:
    """The stages of one model, one after the other, as if they were one."""

    def __init__(self, stages: list[CausalLM]) -> None:
        self.stages = stages
        self.dtype = stages[0].dtype
        self.cache_layers = [layer for stage in stages for layer in stage.cache_layers]

    def bind_cache(self, caches: list[tuple[Tensor, Tensor]]) -> None:
        for stage in self.stages:
            stage.bind_cache(caches[: len(stage.cache_layers)])
            caches = caches[len(stage.cache_layers) :]

    def hidden_states(self, token_ids_T: Tensor, positions_T: Tensor, batch: AttentionBatch) -> Tensor:
        hidden = token_ids_T
        for stage in self.stages:
            hidden = stage.hidden_states(hidden, positions_T, batch)
        return hidden

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self.stages[-1].logits(hidden_RD)


def make_sequences(seed: int = 0) -> list[Sequence]:
    rng = random.Random(seed)
    return [Sequence([rng.randrange(256) for _ in range(length)]) for length in (61, 1, 8, 35, 17)]


def run_in_random_pieces(model: CausalLM | Stages, seed: int) -> list[Tensor]:
    """The logits of those sequences, in chunks, decodes and pauses in one random mix; the same on every rank."""
    rng = random.Random(seed)
    sequences = make_sequences(seed)
    run = PagedRun(model, seed=seed)
    while left := [sequence for sequence in sequences if sequence.num_left]:
        work = [(sequence, min(sequence.num_left, rng.choice([0, 1, 1, 2, 7, 23]))) for sequence in left]
        if work := [(sequence, count) for sequence, count in work if count]:
            run.step(work)
    return [run.logits_of(sequence) for sequence in sequences]


class PagedRun:
    """Computes tokens of several sequences at a time, and keeps the logits of every token."""

    def __init__(self, model: CausalLM | Stages, *, num_blocks: int = 64, block_size: int = 8, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        self.logits: dict[tuple[int, int], Tensor] = {}
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)
        shape = (num_blocks, block_size)
        model.bind_cache(
            [
                (
                    nan_like("key", (*shape, layer.num_kv_heads, layer.key_dim), model.dtype),
                    nan_like("value", (*shape, layer.num_kv_heads, layer.value_dim), model.dtype),
                )
                for layer in model.cache_layers
            ]
        )

    def step(self, work: list[tuple[Sequence, int]]) -> None:
        """Compute the next n tokens of each sequence. Rows with one token are put first, as plans have them."""
        rows = sorted(work, key=lambda row: row[1] > 1)
        batch, token_ids, positions = self._batch(rows)
        with torch.inference_mode():
            hidden_TD = self.model.hidden_states(torch.tensor(token_ids), torch.tensor(positions), batch)
            logits_TV = self.model.logits(hidden_TD)
        at = 0
        for sequence, count in rows:
            for i in range(count):
                self.logits[id(sequence), sequence.num_computed + i] = logits_TV[at + i]
            sequence.num_computed += count
            at += count

    def logits_of(self, sequence: Sequence) -> Tensor:
        """[tokens, V] of all that this run has computed of the sequence."""
        positions = sorted(position for key, position in self.logits if key == id(sequence))
        return torch.stack([self.logits[id(sequence), position] for position in positions])

    def _batch(self, rows: list[tuple[Sequence, int]]) -> tuple[AttentionBatch, list[int], list[int]]:
        token_ids, positions, slots, starts, context_lens = [], [], [], [0], []
        for sequence, count in rows:
            end = sequence.num_computed + count
            while len(sequence.blocks) * self.block_size < end:
                sequence.blocks.append(self._free.pop())
            span = range(sequence.num_computed, end)
            token_ids += sequence.token_ids[span.start : span.stop]
            positions += span
            slots += [sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            starts.append(len(token_ids))
            context_lens.append(end)
        width = -(-max(context_lens) // self.block_size)
        tables = [(sequence.blocks + [NOWHERE] * width)[:width] for sequence, _ in rows]
        batch = AttentionBatch(
            query_starts_R1=torch.tensor(starts, dtype=torch.int32),
            context_lens_R=torch.tensor(context_lens, dtype=torch.int32),
            block_tables_RB=torch.tensor(tables, dtype=torch.int32),
            slots_T=torch.tensor(slots),
            max_query_len=max(count for _, count in rows),
            max_context_len=max(context_lens),
            num_decodes=sum(count == 1 for _, count in rows),
            block_size=self.block_size,
        )
        return batch, token_ids, positions
