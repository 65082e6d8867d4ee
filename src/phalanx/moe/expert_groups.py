"""The experts of one layer on a GPU: one grouped product for all of them.

How many tokens came to an expert is not waited for: all pairs are put in the order of their experts, those of other
ranks behind, and grouped products are told on the device where each expert's end.

Shape suffixes: N tokens, K experts of a token, P pairs of a token and an expert, L this rank's experts, I inputs, O
outputs, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phalanx.moe import four_bits


class ExpertGroups:
    """What the module of a layer's experts computes, whose weights and activation it uses."""

    def __init__(self, module: Any) -> None:
        weights = next(module.parameters())  # of all these experts, whatever it is
        self._module = module
        self._num_experts = len(weights)
        self._numbers_L = torch.arange(self._num_experts, device=weights.device)

    def __call__(self, hidden_ND: Tensor, local_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """What these experts add to each token: [N, D].

        `local_NK` are the experts' places on this rank; what is numbered as many as there are is another rank's, and
        costs no product.
        """
        num_tokens, top_k = local_NK.shape
        if num_tokens == 0:
            return hidden_ND
        local_P, order_P = local_NK.flatten().sort(stable=True)
        ends_L = torch.searchsorted(local_P, self._numbers_L, right=True, out_int32=True)
        out_PD = self._of_rows(hidden_ND.index_select(0, order_P // top_k), local_P, ends_L)
        # Grouped products leave the others' rows out, so that they hold whatever was there.
        out_PD = out_PD.masked_fill_((local_P == self._num_experts)[:, None], 0.0)
        # Back into the tokens' order, so that each one's sum has one order too; `index_add_` on a GPU has none.
        out_NKD = torch.empty_like(out_PD).index_copy_(0, order_P, out_PD).view(num_tokens, top_k, -1)
        return torch.bmm(weights_NK.to(out_NKD.dtype)[:, None], out_NKD)[:, 0]

    def _of_rows(self, hidden_PD: Tensor, local_P: Tensor, ends_L: Tensor) -> Tensor:
        """[P, D]: what each row's expert makes of it, as in transformers' `grouped_mm_experts_forward`.

        Rows are in the order of their experts; `ends_L` is where each expert's end. What comes after the last is
        undefined.
        """
        module = self._module
        if module.has_gate:
            inner_PI = module._apply_gate(self._linear("gate_up_proj", hidden_PD, local_P, ends_L))
        else:
            inner_PI = module.act_fn(self._linear("up_proj", hidden_PD, local_P, ends_L))
        out_PD = self._linear("down_proj", inner_PI, local_P, ends_L)
        # Of transformers 5.17 no module has one, nor says so.
        return module.post_expert_norm(out_PD) if getattr(module, "has_post_expert_norm", False) else out_PD

    def _linear(self, name: str, x_PI: Tensor, local_P: Tensor, ends_L: Tensor) -> Tensor:
        from transformers.integrations.moe import _grouped_linear  # not before a rank can say what goes wrong with it

        module, bias_PO = self._module, None
        weight = getattr(module, name)
        if isinstance(weight, four_bits.FourBitWeight):
            return four_bits.grouped_linear(x_PI, weight, ends_L)
        if module.has_bias:
            bias_PO = getattr(module, f"{name}_bias")[local_P.clamp(max=self._num_experts - 1)]
        out_PO: Tensor = _grouped_linear(x_PI, weight, ends_L, bias_PO, module.is_transposed)
        return out_PO


def install_groups(module: Any) -> None:
    """Have a module of transformers, whose weights are in place, compute its experts by grouped products."""
    module.forward = ExpertGroups(module)
