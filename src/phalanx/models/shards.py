"""Which part of every parameter a rank holds, by the model's own tensor-parallel plan.

transformers names a style for each linear layer ("layers.*.self_attn.q_proj": "colwise"). What the styles mean for
inference is the data below, with plans for what transformers would replicate; attention heads are shared out by KV
group and the vocabulary in equal parts, whatever the plan says.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.moe.balance import first_placement
from phalanx.topology.sharding import ALIGNMENT, ExpertShare, Span, round_up, shard_heads, split_columns, vocab_part

COLUMNS = ("colwise", "colwise_gather_output")
"""The outputs are shared out: dimension 0 of weight and bias.

transformers gathers those of projections that are normalised over all heads; here the ranks share the sum of squares
instead."""

PACKED_COLUMNS = ("packed_colwise",)
"""Two matrices one above the other (gate and up of every expert), each shared out: dimension 1.

Experts' columns are padded to the alignment that grouped products insist on. Zeros add nothing to the sum."""

ROWS = ("rowwise", "rowwise_split_input")
"""The inputs are shared out: the last dimension of the weight. The ranks' outputs are to be summed."""

INTERLEAVED_COLUMNS = ("interleaved_colwise",)
"""Ours: gate and up of every expert in turn, a column each: the last dimension. Padded like packed columns."""

TRANSPOSED_ROWS = ("transposed_rowwise",)
"""Ours: the inputs of every expert are dimension 1, and padded."""

ADDED_ONCE = ("added_once",)
"""Ours: a bias of what the ranks sum: the first rank has it, the others have zeros."""

REPLICATED = (None, "replicated_with_grad_allreduce", "mla_kv_a_proj")

EXPERTS = ("moe_tp_experts",)
"""A module whose fused weights have styles of their own, and whose output is to be summed over the ranks."""

_HEADS = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_NORMS_OF_ALL_HEADS = {"layers.*.self_attn.q_norm": "colwise", "layers.*.self_attn.k_norm": "colwise"}
_LATENT_HEADS = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_OWN_PLANS: dict[str, dict[str, str]] = {
    "deepseek_v3": _LATENT_HEADS,
    "gpt_oss": {
        **_HEADS,
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.mlp.experts.gate_up_proj": "interleaved_colwise",
        "layers.*.mlp.experts.gate_up_proj_bias": "interleaved_colwise",
        "layers.*.mlp.experts.down_proj": "transposed_rowwise",
        "layers.*.mlp.experts.down_proj_bias": "added_once",
        "layers.*.mlp.experts": "moe_tp_experts",
    },
    "minimax_m2": _NORMS_OF_ALL_HEADS,
    "olmoe": _NORMS_OF_ALL_HEADS,
}
"""What transformers' plans leave whole, by the model's type."""

OF_QUERY_HEADS = ("q_proj", "q_b_proj", "q_norm", "sinks", "o_proj")
OF_KV_HEADS = ("k_proj", "v_proj", "k_norm", "kv_b_proj")


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

    @classmethod
    def zeros(cls, full_shape: tuple[int, ...]) -> Shard:
        """Nothing of the parameter, in its shape."""
        return cls.of(full_shape, 0, Span(0, 0), span_size=full_shape[0])


class Sharding:
    """The parts of one rank. `model` may be on the meta device.

    Raises ConfigError naming `tensor_parallel_size` if a rank would go without a head or a column, CheckpointError if
    the query heads cannot be shared out evenly to the KV heads.
    """

    def __init__(self, model: Any, rank: int, num_ranks: int, experts: ExpertShare | None = None) -> None:
        """`experts`: None if of every expert each rank gets a part."""
        self._experts = experts
        self.rank = rank
        self.num_ranks = num_ranks
        config = model.config
        self._num_query_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        if hasattr(config, "kv_lora_rank"):  # latent attention expands keys and values for every query head
            self._num_kv_heads = self._num_query_heads
        if self._num_query_heads % self._num_kv_heads:
            heads = f"{self._num_query_heads} query heads and {self._num_kv_heads} KV heads"
            raise CheckpointError(f"the model's configuration has {heads}: these cannot be shared out evenly")
        self._heads = shard_heads(self._num_query_heads, self._num_kv_heads, num_ranks, rank)
        prefix = model.base_model_prefix
        plan = {**(config.base_model_tp_plan or {}), **_OWN_PLANS.get(config.model_type, {})}
        self._plan: dict[str, str] = {f"{prefix}.{name}": style for name, style in plan.items()}
        names = {module: name for name, module in model.named_modules()}
        self.embedding_name = f"{names[model.get_input_embeddings()]}.weight"
        self.head_name = f"{names[model.get_output_embeddings()]}.weight"

    def experts(self, num_experts: int) -> Span:
        """The physical experts that this rank has whole."""
        assert self._experts is not None
        return self._experts.span(num_experts)

    @property
    def num_redundant_experts(self) -> int:
        """Physical experts of each layer beyond one for each of its experts."""
        assert self._experts is not None
        return self._experts.num_redundant

    @property
    def is_first_with_its_kv_heads(self) -> bool:
        """Whether no rank before this one has the same KV heads: where these are counted over the ranks, once each."""
        return self._heads.query.start * self._num_kv_heads == self._heads.kv.start * self._num_query_heads

    def style(self, name: str) -> str | None:
        """The plan's style for a module or parameter; None if it has none."""
        return self._plan.get(re.sub(r"\.\d+\.", ".*.", name))

    def shard(self, name: str, parameter: Tensor) -> Shard:
        """This rank's part of a parameter or buffer. Raises UnsupportedModelError for a style not known here."""
        full_shape = tuple(parameter.shape)
        if name in (self.embedding_name, self.head_name):
            return self._vocab_shard(full_shape)
        module_name, _, leaf = name.rpartition(".")
        if self._experts is not None and self.style(module_name) in EXPERTS:
            return Shard.of(full_shape, 0, *self._expert_spans(self._experts, full_shape[0]))
        planned = name if self.style(name) else module_name
        style = self.style(planned)
        if style in REPLICATED or (style in ROWS and leaf == "bias"):
            return Shard.whole(full_shape)
        if style in COLUMNS:
            return Shard.of(full_shape, 0, self._columns(planned, full_shape[0]))
        if style in ROWS:
            span = self._columns(planned, full_shape[-1])
            span_size = span.size if len(full_shape) == 2 else round_up(span.size, ALIGNMENT)
            return Shard.of(full_shape, len(full_shape) - 1, span, span_size=span_size)
        if style in PACKED_COLUMNS:
            half = full_shape[1] // 2
            span = self._columns(planned, half)
            return Shard.of(full_shape, 1, span, span.shifted(half), span_size=round_up(span.size, ALIGNMENT))
        if style in INTERLEAVED_COLUMNS:
            span = self._columns(planned, full_shape[-1] // 2)
            span_size = 2 * round_up(span.size, ALIGNMENT)
            return Shard.of(full_shape, len(full_shape) - 1, span.scaled(2), span_size=span_size)
        if style in TRANSPOSED_ROWS:
            span = self._columns(planned, full_shape[1])
            return Shard.of(full_shape, 1, span, span_size=round_up(span.size, ALIGNMENT))
        if style in ADDED_ONCE:
            return Shard.whole(full_shape) if self.rank == 0 else Shard.zeros(full_shape)
        raise UnsupportedModelError(f"transformers plans {name} as {style!r}, which is not known here")

    @staticmethod
    def _expert_spans(share: ExpertShare, num_experts: int) -> list[Span]:
        """The logical experts that this rank begins with."""
        mine = share.span(num_experts)
        if not share.num_redundant:
            return [mine]
        placement = first_placement(num_experts, share.num_redundant)
        return [Span(expert, expert + 1) for expert in placement[mine.start : mine.stop]]

    def _columns(self, name: str, size: int) -> Span:
        part = name.rpartition(".")[2]
        if part in OF_QUERY_HEADS:
            return self._heads.query.scaled(size // self._num_query_heads)
        if part in OF_KV_HEADS:
            return self._heads.kv.scaled(size // self._num_kv_heads)
        return split_columns(size, self.num_ranks, self.rank)

    def _vocab_shard(self, full_shape: tuple[int, ...]) -> Shard:
        part = vocab_part(full_shape[0], self.num_ranks)
        span = Span(self.rank * part, (self.rank + 1) * part).intersection(Span(0, full_shape[0]))
        return Shard.of(full_shape, 0, span, span_size=part)
