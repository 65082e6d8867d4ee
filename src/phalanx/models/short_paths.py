"""Parts of transformers' definitions, computed with fewer operations. The rest of a definition runs as it is.

On a CPU a step with few rows takes no longer for its matrices than for the many small operations between them, each
some microseconds of Python and dispatch. So parts that every family has in the same form are exchanged for ones that
compute the same. What is not known here is left alone. docs/decisions/0011 has the measurements.

Shape suffixes: T tokens, H query heads, K KV heads, D head size, I hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phalanx.models.attention import PagedAttention
from phalanx.models.packed import Linear, Product

_SLIDING_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda module: None,
    "MistralAttention": lambda module: module.config.sliding_window,
    "MixtralAttention": lambda module: module.config.sliding_window,
    "Qwen2Attention": lambda module: module.sliding_window,
    "Qwen3Attention": lambda module: module.sliding_window,
    "Qwen3MoeAttention": lambda module: module.sliding_window,
    "Glm4MoeAttention": lambda module: None,
}
"""Attention that is computed as SelfAttention does it, by its class, and how to find its sliding window."""

_NORMS = (
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "MixtralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
    "OlmoeRMSNorm",
    "DeepseekV2RMSNorm",
    "DeepseekV3RMSNorm",
    "MiniMaxM2RMSNorm",
    "Glm4MoeRMSNorm",
)

_MLPS = (
    "LlamaMLP",
    "MistralMLP",
    "Qwen2MLP",
    "Qwen3MLP",
    "Qwen3MoeMLP",
    "DeepseekV2MLP",
    "DeepseekV3MLP",
    "Glm4MoeMLP",
)


class RMSNorm(nn.Module):
    """Root mean square normalisation, rounded where transformers rounds: before the weight."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self._mean_of_one = 1 / weight.shape[0]
        self._epsilon = torch.tensor(epsilon, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Of the last dimension; the same shape."""
        wide = x.float()
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = torch.add(self._epsilon, squares, alpha=self._mean_of_one).rsqrt_()
        return torch.mul(wide, scale).to(x.dtype).mul_(self.weight)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of a step's positions, once for all layers in the form that SelfAttention wants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [T, 1, D], where D may be the first part of a head only.

        The sines of the first half are negated: it takes away what the second half adds.
        """
        cos_1TD, sin_1TD = self._module(x, position_ids)
        first, second = sin_1TD.chunk(2, dim=-1)
        return cos_1TD[0, :, None], torch.cat((-first, second), dim=-1)[0, :, None]


class SelfAttention(nn.Module):
    """An attention layer: projections, norms of queries and keys where the model has them, rotation, attention."""

    def __init__(self, path: str, module: Any) -> None:
        super().__init__()
        self.product = _product(path, module, "q_proj", "k_proj", "v_proj")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = module.q_proj, module.k_proj, module.v_proj, module.o_proj
        self.q_norm, self.k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        self.layer_idx: int = module.layer_idx
        self.head_dim: int = module.head_dim
        self.paged_attention: PagedAttention | None = None
        self._scale: float = module.scaling
        self._sliding_window = _SLIDING_WINDOWS[type(module).__name__](module)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, None]:
        """What transformers' decoder layer calls: [1, T, I] to [1, T, I], and no attention weights."""
        assert self.paged_attention is not None
        num_tokens = hidden_states.shape[1]
        query_THD, key_TKD, value_TKD = (
            part_1TO.view(num_tokens, -1, self.head_dim) for part_1TO in self.product(hidden_states)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query_THD, key_TKD = self.q_norm(query_THD), self.k_norm(key_TKD)
        cos_T1D, sin_T1D = position_embeddings
        query_THD, key_TKD = _rotate(query_THD, cos_T1D, sin_T1D), _rotate(key_TKD, cos_T1D, sin_T1D)
        out_THD = self.paged_attention(query_THD, key_TKD, value_TKD, self._scale, self._sliding_window)
        return self.o_proj(out_THD.reshape(1, num_tokens, -1)), None


class GatedMLP(nn.Module):
    """The layer after attention: act(gate) * up, projected down."""

    def __init__(self, path: str, module: Any) -> None:
        super().__init__()
        self.product = _product(path, module, "gate_proj", "up_proj")
        self.gate_proj, self.up_proj, self.down_proj = module.gate_proj, module.up_proj, module.down_proj
        self.act_fn = module.act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, I] to [1, T, I]."""
        gate, up = self.product(hidden_states)
        out: Tensor = self.down_proj(self.act_fn(gate).mul_(up))
        return out


def _product(path: str, module: Any, *names: str) -> Product:
    layers = [(name, module.get_submodule(name)) for name in names]
    return Product(*(Linear(f"{path}.{name}", layer.weight, layer.bias) for name, layer in layers))


def _rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    size = cos_T1D.shape[-1]
    if size < x_THD.shape[-1]:
        return torch.cat((_rotate(x_THD[..., :size], cos_T1D, sin_T1D), x_THD[..., size:]), dim=-1)
    return torch.addcmul(x_THD * cos_T1D, x_THD.roll(size // 2, -1), sin_T1D)


def install_short_paths(definition: Any) -> None:
    """Exchange the parts of a definition that are known. Its weights are in place, and parameters keep their names."""
    for path, module in list(definition.named_modules()):
        if type(module).__name__ in _NORMS:
            definition.set_submodule(path, RMSNorm(module.weight, module.variance_epsilon))
        elif type(module).__name__ in _MLPS:
            definition.set_submodule(path, GatedMLP(path, module))
    attention = {path: module for path, module in definition.named_modules() if hasattr(module, "layer_idx")}
    if all(type(module).__name__ in _SLIDING_WINDOWS for module in attention.values()):
        for path, module in attention.items():
            definition.set_submodule(path, SelfAttention(path, module))
        definition.base_model.rotary_emb = RotaryEmbedding(definition.base_model.rotary_emb)
