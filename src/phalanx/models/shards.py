"""Which part of every parameter a rank holds, by the model's own tensor-parallel plan.

transformers names a style for each linear layer ("layers.*.self_attn.q_proj": "colwise"). What the styles mean for
inference is the data below; attention heads are shared out by KV group and the vocabulary in equal parts, whatever the
plan says.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.topology.sharding import ALIGNMENT, Span, round_up, shard_heads, split_columns, vocab_part

COLUMNS = ("colwise",)
"""The outputs are shared out: dimension 0 of weight and bias."""

PACKED_COLUMNS = ("packed_colwise",)
"""Two matrices one above the other (gate and up of every expert), each shared out: dimension 1.

Experts' columns are padded to the alignment that grouped products insist on. Zeros add nothing to the sum."""

ROWS = ("rowwise",)
"""The inputs are shared out: the last dimension of the weight. The ranks' outputs are to be summed."""

REPLICATED = (None, "replicated_with_grad_allreduce")

EXPERTS = ("moe_tp_experts",)
"""A module whose fused weights have styles of their own, and whose output is to be summed over the ranks."""

QUERY_PROJECTIONS = ("q_proj", "o_proj")
KV_PROJECTIONS = ("k_proj", "v_proj")


class Shard(NamedTuple):
    """A rank's part of a parameter: some indices of one dimension, and all of the others."""

    full_shape: tuple[int, ...]
    dim: int
    spans: tuple[Span, ...]
    """Indices of the full parameter along `dim`, in their order in this rank's part."""
    span_size: int
    """What each span takes up in this rank's part: its own size, or more, the rest being zeros."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's part."""
        return (*self.full_shape[: self.dim], len(self.spans) * self.span_size, *self.full_shape[self.dim + 1 :])

    @property
    def is_padded(self) -> bool:
        return any(span.size < self.span_size for span in self.spans)

    @classmethod
    def of(cls, full_shape: tuple[int, ...], dim: int, *spans: Span, span_size: int | None = None) -> Shard:
        """Spans of the same size, without padding unless `span_size` is larger."""
        return cls(full_shape, dim, spans, spans[0].size if span_size is None else span_size)

    @classmethod
    def whole(cls, full_shape: tuple[int, ...]) -> Shard:
        return cls.of(full_shape, 0, Span(0, full_shape[0]))


class Sharding:
    """The parts of one rank. `model` may be on the meta device.

    Raises ConfigError naming `tensor_parallel_size` if a rank would go without a head or a column, CheckpointError if
    the query heads cannot be shared out evenly to the KV heads.
    """

    def __init__(self, model: Any, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        config = model.config
        self._num_query_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        if self._num_query_heads % self._num_kv_heads:
            heads = f"{self._num_query_heads} query heads and {self._num_kv_heads} KV heads"
            raise CheckpointError(f"the model's configuration has {heads}: these cannot be shared out evenly")
        self._heads = shard_heads(self._num_query_heads, self._num_kv_heads, num_ranks, rank)
        prefix = model.base_model_prefix
        self._plan: dict[str, str] = {f"{prefix}.{name}": style for name, style in config.base_model_tp_plan.items()}
        names = {module: name for name, module in model.named_modules()}
        self.embedding_name = f"{names[model.get_input_embeddings()]}.weight"
        self.head_name = f"{names[model.get_output_embeddings()]}.weight"

    def style(self, name: str) -> str | None:
        """The plan's style for a module or parameter; None if it has none."""
        return self._plan.get(re.sub(r"\.\d+\.", ".*.", name))

    def shard(self, name: str, parameter: nn.Parameter) -> Shard:
        """This rank's part of a parameter. Raises UnsupportedModelError for a style that is not known here."""
        full_shape = tuple(parameter.shape)
        if name in (self.embedding_name, self.head_name):
            return self._vocab_shard(full_shape)
        module_name, _, leaf = name.rpartition(".")
        style = self.style(name) or self.style(module_name)
        if style in REPLICATED or (style in ROWS and leaf == "bias"):
            return Shard.whole(full_shape)
        if style in COLUMNS:
            return Shard.of(full_shape, 0, self._columns(module_name, full_shape[0]))
        if style in ROWS:
            span = self._columns(module_name, full_shape[-1])
            span_size = span.size if len(full_shape) == 2 else round_up(span.size, ALIGNMENT)
            return Shard.of(full_shape, len(full_shape) - 1, span, span_size=span_size)
        if style in PACKED_COLUMNS:
            half = full_shape[1] // 2
            span = self._columns(module_name, half)
            return Shard.of(full_shape, 1, span, span.shifted(half), span_size=round_up(span.size, ALIGNMENT))
        raise UnsupportedModelError(f"transformers plans {name} as {style!r}, which is not known here")

    def _columns(self, module_name: str, size: int) -> Span:
        projection = module_name.rpartition(".")[2]
        if projection in QUERY_PROJECTIONS:
            return self._heads.query.scaled(size // self._num_query_heads)
        if projection in KV_PROJECTIONS:
            return self._heads.kv.scaled(size // self._num_kv_heads)
        return split_columns(size, self.num_ranks, self.rank)

    def _vocab_shard(self, full_shape: tuple[int, ...]) -> Shard:
        part = vocab_part(full_shape[0], self.num_ranks)
        span = Span(self.rank * part, (self.rank + 1) * part).intersection(Span(0, full_shape[0]))
        return Shard.of(full_shape, 0, span, span_size=part)
