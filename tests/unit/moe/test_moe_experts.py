"""Experts of a rank compute what transformers' module with all of them does, in sum over the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.moe import experts as of_rank
from phalanx.moe.dispatcher import AllGatherReduceScatter
from phalanx.moe.experts import share_out
from phalanx.topology.sharding import Span

NUM_EXPERTS, TOP_K, WIDTH = 5, 3, 16


def make_experts(family: str, kind: Any, weights: dict[str, Tensor] | None = None) -> Any:
    """Random ones, or with these weights, for as many experts as they have."""
    num_experts = NUM_EXPERTS if weights is None else len(next(iter(weights.values())))
    sizes = {"num_experts": num_experts, "num_local_experts": num_experts, "moe_intermediate_size": 12}
    config = AutoConfig.for_model(family, hidden_size=WIDTH, intermediate_size=12, **sizes)
    config._experts_implementation = "eager"
    module = kind(config).requires_grad_(False)
    if weights is not None:
        module.load_state_dict(weights)
        return module
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(generator=generator)
    return module


def alone() -> AllGatherReduceScatter:
    group = SingleGroup(GroupSpec("alone", "single", (0,), epoch=1, timeout_s=1.0, join_timeout_s=1.0))
    return AllGatherReduceScatter(group, group)


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize(("family", "kind"), [("qwen3_moe", Qwen3MoeExperts), ("gpt_oss", GptOssExperts)])
def test_shares_add_up_to_the_whole(
    family: str, kind: Any, num_tokens: int, is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With biases and transposed weights (gpt-oss) as without; a share may get no token. A GPU's way runs anywhere."""
    if is_gpu:
        monkeypatch.setattr(of_rank, "_of_pairs", lambda *arguments: of_rank._of_all(*arguments[:-1]))
    whole = make_experts(family, kind)
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, WIDTH, generator=generator)
    weights_TK, experts_TK = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(dim=1).topk(TOP_K)
    with torch.inference_mode():
        expected_TD = whole(hidden_TD, experts_TK, weights_TK)
        out_TD = torch.zeros_like(expected_TD)
        for mine in (Span(0, 2), Span(2, 3), Span(3, NUM_EXPERTS)):
            share = {name: weight[mine.start : mine.stop].clone() for name, weight in whole.state_dict().items()}
            module, dispatcher = make_experts(family, kind, share), alone()
            load = share_out(module, mine, dispatcher)
            dispatcher.begin([num_tokens])
            out_TD += module(hidden_TD, experts_TK, weights_TK)
            assert load.counts() == [int((experts_TK == expert).sum()) for expert in range(mine.start, mine.stop)]
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-5, atol=1e-5)
