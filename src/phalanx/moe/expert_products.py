"""The experts of one layer on a CPU: by one kernel, or by a product for each that a token came to.

Their weights can be packed, as those of linear layers (docs/decisions/0011): each expert's by itself, so that a step
reads the experts that it needs, and one that moves to another rank is packed anew alone. Packed ones are multiplied by
our kernel where there is one (docs/decisions/0027).

Shape suffixes: N tokens, K experts of a token, P pairs of a token and one of this rank's experts, R those pairs of one
expert, S this rank's experts, I inputs, O outputs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from phalanx.moe.expert_kernel import ExpertKernel, find_kernel, say_there_is_none

MIN_ROWS, FAST_ROWS = 3, 4
"""oneDNN reads a packed weight faster for four rows than for one or two. An expert with so few has its neighbours' rows
multiplied as well, and what comes of those is left out: a tenth less time in bfloat16, a fifth less in float32."""


class ExpertLinear:
    """A linear layer of each of a rank's experts. It begins with the plain weights."""

    def __init__(self, name: str, weight: Tensor, bias_SO: Tensor | None, *, is_transposed: bool) -> None:
        """`weight` is [S, O, I], or [S, I, O] if it is transposed."""
        self._name = name
        self._weight = weight
        self._weight_SOI = weight.transpose(1, 2) if is_transposed else weight
        self._bias_SO = bias_SO
        self._is_transposed = is_transposed
        self._packed: list[Tensor] | None = None
        self._addresses: Tensor | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What is not read while it is packed, by parameter names."""
        return {self._name: self._weight}

    @property
    def biases(self) -> Sequence[Tensor]:
        """None is packed."""
        return ()

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """[S, O, I]."""
        num_experts, num_outputs, num_inputs = self._weight_SOI.shape
        return num_experts, num_outputs, num_inputs

    @property
    def addresses(self) -> Tensor | None:
        """[S], int64: where the packed weights lie, if they are packed."""
        return self._addresses

    def pack(self, keep: Callable[[int, Tensor], Tensor] | None = None) -> None:
        """Copy the weights into packed ones, which with `keep` lie where it puts those of each expert.

        The plain ones are not read any more, and may be lost.
        """
        packed = map(_pack, self._weight_SOI)
        self.use([*packed] if keep is None else [keep(slot, one) for slot, one in enumerate(packed)])

    def use(self, packed: Sequence[Tensor]) -> None:
        """Compute by these, one of each expert."""
        self._packed = [*packed]
        self._addresses = torch.tensor([*map(torch.ops.mkldnn.data_ptr, packed)], device="cpu")

    def unpack(self) -> None:
        """Write the weights back where they were, bit for bit, and use those."""
        assert self._packed is not None
        packed, self._packed, self._addresses = self._packed[::-1], None, None
        for weight_OI in self._weight_SOI:
            weight_OI.copy_(packed.pop().to_dense())

    def forget(self) -> None:
        """Use the plain weights, whatever they hold by now."""
        self._packed = self._addresses = None

    def read(self, slots: Sequence[int]) -> Tensor:
        """These experts' weights as the parameter has them, packed or not: [slots, ...]."""
        rows = self._weight.new_empty(len(slots), *self._weight.shape[1:])
        rows_OI = rows.transpose(1, 2) if self._is_transposed else rows
        for row_OI, slot in zip(rows_OI, slots, strict=True):
            row_OI.copy_(self._weight_SOI[slot] if self._packed is None else self._packed[slot].to_dense())
        return rows

    def write(self, slots: Sequence[int], rows: Tensor) -> None:
        """Have these experts' weights become `rows`, in the form that `read` gives. Packed ones stay packed."""
        rows_OI = rows.transpose(1, 2) if self._is_transposed else rows
        if self._packed is None:
            for row_OI, slot in zip(rows_OI, slots, strict=True):
                self._weight_SOI[slot].copy_(row_OI)
            return
        packed = [*self._packed]
        for row_OI, slot in zip(rows_OI, slots, strict=True):
            packed[slot] = _pack(row_OI)
        self.use(packed)

    def __call__(self, slots: Sequence[int], counts: Sequence[int], x_PI: Tensor) -> Tensor:
        """What these experts' layers make of the rows of each, so many, that stand one below the other: [P, O]."""
        if self._packed is not None and len(x_PI) < FAST_ROWS:
            x_PI = functional.pad(x_PI, (0, 0, 0, FAST_ROWS - len(x_PI)))
        start, parts = 0, []
        for slot, count in zip(slots, counts, strict=True):
            if self._packed is None or count >= MIN_ROWS:
                parts.append(self._product(slot, x_PI[start : start + count]))
            else:
                first = min(start, len(x_PI) - FAST_ROWS)
                out_RO = self._product(slot, x_PI[first : first + FAST_ROWS])
                parts.append(out_RO[start - first : start - first + count])
            start += count
        return torch.cat(parts)

    def _product(self, slot: int, x_RI: Tensor) -> Tensor:
        bias_O = None if self._bias_SO is None else self._bias_SO[slot]
        if self._packed is None:
            return functional.linear(x_RI, self._weight_SOI[slot], bias_O)
        out_RO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_RI, self._packed[slot], bias_O, "none", [], "")
        return out_RO


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed


class ExpertProducts:
    """What the module of a layer's experts computes, whose weights and activation it uses."""

    def __init__(self, name: str, module: Any) -> None:
        def linear(leaf: str) -> ExpertLinear:
            bias_SO = getattr(module, f"{leaf}_bias").data if module.has_bias else None
            weight = getattr(module, leaf).data
            return ExpertLinear(f"{name}.{leaf}", weight, bias_SO, is_transposed=module.is_transposed)

        self.linears = {leaf: linear(leaf) for leaf in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")}
        """By the names of their parameters in the module."""
        self._up, self._down = self.linears.values()
        self._module = module
        self._num_experts = len(module.down_proj)
        self._kernel: ExpertKernel | None = None

    def compile(self) -> None:
        """Have packed weights multiplied by our kernel, if there is one for them. The first is to be made."""
        if _is_plain_silu(self._module):
            _, hidden, inner = self._down.packed_shape
            self._kernel = find_kernel(hidden, inner, self._module.down_proj.dtype)
        else:
            say_there_is_none("they have biases, or another activation than silu")

    def __call__(self, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """What these experts add to each token: [N, D].

        `local_NK` are the experts' places on this rank; what is numbered as many as there are is another rank's, and
        costs nothing.
        """
        kernel, up, down = self._kernel, self._up.addresses, self._down.addresses
        if kernel is not None and up is not None and down is not None and kernel.suits(local_NK, self._num_experts):
            return kernel(hidden_ND, local_NK, weights_NK, up, down)
        if len(hidden_ND) == 1:
            return self._of_one(hidden_ND, local_NK[0], weights_NK[0])
        top_k, local = local_NK.shape[1], local_NK.reshape(-1)
        counts = torch.bincount(local, minlength=self._num_experts + 1).tolist()[: self._num_experts]
        num_pairs, order = sum(counts), local.argsort(stable=True)
        if not num_pairs:
            return torch.zeros_like(hidden_ND)
        slots = [slot for slot, count in enumerate(counts) if count]
        hidden_PD = hidden_ND.index_select(0, order[:num_pairs] // top_k)
        out_PD = self._of_rows(slots, [counts[slot] for slot in slots], hidden_PD)
        row_NK = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(local_NK)
        return _weighted_sums(out_PD, row_NK, weights_NK).to(hidden_ND.dtype)

    def _of_one(self, hidden_1D: Tensor, local_K: Tensor, weights_K: Tensor) -> Tensor:
        """Of a single token: there is nothing to put in order."""
        local = local_K.tolist()
        mine = [k for k, slot in enumerate(local) if slot < self._num_experts]
        if not mine:
            return torch.zeros_like(hidden_1D)
        hidden_PD = hidden_1D.expand(len(mine), -1).contiguous()
        out_PD = self._of_rows([local[k] for k in mine], [1] * len(mine), hidden_PD)
        weights_P = weights_K if len(mine) == len(local) else weights_K[mine]
        return (weights_P.float() @ out_PD.float())[None].to(hidden_1D.dtype)

    def _of_rows(self, slots: Sequence[int], counts: Sequence[int], hidden_PD: Tensor) -> Tensor:
        """[P, D]: what each of the experts makes of its rows."""
        module = self._module
        up_PO = self._up(slots, counts, hidden_PD)
        inner_PI = module._apply_gate(up_PO) if module.has_gate else module.act_fn(up_PO)
        out_PD = self._down(slots, counts, inner_PI)
        # Of transformers 5.17 no module has one, nor says so.
        return module.post_expert_norm(out_PD) if getattr(module, "has_post_expert_norm", False) else out_PD


def _is_plain_silu(module: Any) -> bool:
    """Whether it computes down(silu(gate) * up), and nothing beside."""
    from transformers.activations import SiLUActivation  # not before a rank can say what goes wrong with it
    from transformers.integrations.moe import _default_apply_gate

    return (
        module.has_gate
        and module.is_concatenated
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
    )


def _weighted_sums(out_PD: Tensor, row_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Of each token's rows, by their weights; what is beyond the rows is no row. Sums are in float32."""
    is_row_NK = row_NK < len(out_PD)
    num_rows_N = is_row_NK.sum(dim=1)
    dtype = torch.promote_types(out_PD.dtype, weights_NK.dtype)
    return functional.embedding_bag(
        row_NK[is_row_NK],
        out_PD.to(dtype),
        num_rows_N.cumsum(0) - num_rows_N,
        mode="sum",
        per_sample_weights=weights_NK[is_row_NK].to(dtype),
    )


def install_products(name: str, module: Any) -> ExpertProducts:
    """Have a module of transformers, whose weights are in place, compute its experts by products."""
    products = ExpertProducts(name, module)
    module.products = module.forward = products
    return products
