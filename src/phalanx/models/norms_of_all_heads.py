"""Attention whose queries, and whose keys, are normalised over all heads at once (OLMoE, MiniMax-M2).

A rank has some of the heads, so the ranks add up their sums of squares: one small all-reduce for queries and keys
together. transformers would gather the projections instead.

Shape suffixes: T tokens, H query heads of this rank, K KV heads, D head size, I hidden size, O outputs of a projection.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.collectives.group import Group
from phalanx.models.attention import PagedAttention
from phalanx.models.packed import Linear, Product
from phalanx.models.shards import COLUMNS, Sharding


class AllHeadsNormAttention(nn.Module):
    """One attention layer. Its parameters keep transformers' names."""

    def __init__(self, path: str, module: Any, full_sizes: tuple[int, int], sharding: Sharding, group: Group) -> None:
        """`full_sizes` are the outputs of q_proj and of k_proj on all ranks together."""
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = module.q_proj, module.k_proj, module.v_proj, module.o_proj
        self.q_norm, self.k_norm = module.q_norm, module.k_norm
        self.layer_idx: int = module.layer_idx
        self.head_dim: int = module.head_dim
        self.paged_attention: PagedAttention | None = None
        projections = [(f"{path}.{name}", module.get_submodule(name)) for name in ("q_proj", "k_proj", "v_proj")]
        self.product = Product(*(Linear(name, layer.weight, layer.bias) for name, layer in projections))
        self._rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        self._scale: float = module.scaling
        self._clip: float | None = getattr(module.config, "clip_qkv", None)
        self._epsilon: float = module.q_norm.variance_epsilon
        self._counts_keys = sharding.is_first_with_its_kv_heads
        self._full_sizes_2 = torch.tensor(full_sizes, dtype=torch.float32, device=module.q_norm.weight.device)
        self._group = group

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What transformers' decoder layer calls: [1, T, I] to [1, T, I], and no attention weights."""
        assert self.paged_attention is not None
        query_1TO, key_1TO, value_1TO = self.product(hidden_states)
        query_1TO, key_1TO = self._normalise(query_1TO, key_1TO)
        if self._clip is not None:
            query_1TO, key_1TO, value_1TO = (
                part.clamp(-self._clip, self._clip) for part in (query_1TO, key_1TO, value_1TO)
            )
        num_tokens = hidden_states.shape[1]
        query_1THD, key_1TKD, value_1TKD = (
            part.view(1, num_tokens, -1, self.head_dim) for part in (query_1TO, key_1TO, value_1TO)
        )
        query_1THD, key_1TKD = self._rotate(query_1THD, key_1TKD, *position_embeddings, unsqueeze_dim=2)
        out_THD = self.paged_attention(query_1THD[0], key_1TKD[0], value_1TKD[0], self._scale, None)
        return self.o_proj(out_THD.reshape(1, num_tokens, -1)), None

    def _normalise(self, query_1TO: Tensor, key_1TO: Tensor) -> tuple[Tensor, Tensor]:
        wide_query_1TO, wide_key_1TO = query_1TO.float(), key_1TO.float()
        query_1T, key_1T = wide_query_1TO.square().sum(-1), wide_key_1TO.square().sum(-1)
        if not self._counts_keys:
            key_1T = torch.zeros_like(key_1T)
        squares_T2 = self._group.all_reduce(torch.stack((query_1T[0], key_1T[0]), dim=-1))
        scale_T2 = (squares_T2 / self._full_sizes_2 + self._epsilon).rsqrt()
        query_1TO = self.q_norm.weight * (wide_query_1TO * scale_T2[:, :1]).to(query_1TO.dtype)
        key_1TO = self.k_norm.weight * (wide_key_1TO * scale_T2[:, 1:]).to(key_1TO.dtype)
        return query_1TO, key_1TO


def install_norms_of_all_heads(
    definition: Any, full_shapes: dict[str, tuple[int, ...]], sharding: Sharding, group: Group
) -> None:
    """Exchange the attention layers that normalise over all heads. Weights are in place.

    `full_shapes` has the whole parameters' shapes by name.
    """
    for path, module in list(definition.named_modules()):
        if sharding.style(f"{path}.q_norm") in COLUMNS and hasattr(module, "q_norm"):
            (num_queries,), (num_keys,) = full_shapes[f"{path}.q_norm.weight"], full_shapes[f"{path}.k_norm.weight"]
            attention = AllHeadsNormAttention(path, module, (num_queries, num_keys), sharding, group)
            definition.set_submodule(path, attention)
