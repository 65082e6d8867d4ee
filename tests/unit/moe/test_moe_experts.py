"""Experts of a rank compute what transformers' module with all of them does, in sum over the ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.models.packed import can_pack
from phalanx.moe.dispatcher import AllGatherReduceScatter
from phalanx.moe.expert_groups import install_groups
from phalanx.moe.expert_products import ExpertLinear, install_products
from phalanx.moe.experts import share_out
from phalanx.topology.sharding import Span

NUM_EXPERTS, TOP_K, WIDTH = 5, 3, 16
KINDS = [("qwen3_moe", Qwen3MoeExperts), ("gpt_oss", GptOssExperts)]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, torch.device("cpu"))]


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


def install(module: Any, *, is_packed: bool) -> None:
    products = install_products("experts", module)
    if is_packed:
        for linear in products.linears.values():
            linear.pack()
        for parameter in (module.gate_up_proj, module.down_proj):
            parameter.fill_(float("nan"))  # is not read


def alone() -> AllGatherReduceScatter:
    group = SingleGroup(GroupSpec("alone", "single", (0,), epoch=1, timeout_s=1.0, join_timeout_s=1.0))
    return AllGatherReduceScatter(group, group)


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("form", ["groups", "plain", "packed"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_shares_add_up_to_the_whole(family: str, kind: Any, form: str, num_tokens: int) -> None:
    """With biases and transposed weights (gpt-oss) as without; a share may get no token."""
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
            if form == "groups":  # as on a GPU
                install_groups(module)
            else:
                install(module, is_packed=form == "packed")
            load = share_out(module, mine, dispatcher)
            dispatcher.begin([num_tokens])
            out_TD += module(hidden_TD, experts_TK, weights_TK)
            assert load.counts() == [int((experts_TK == expert).sum()) for expert in range(mine.start, mine.stop)]
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 9, 200])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_products_in_bfloat16(family: str, kind: Any, is_packed: bool, num_tokens: int) -> None:
    """No further from the exact result than transformers is, of which each weighted row is rounded."""
    if is_packed and not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("no kernels for bfloat16")
    module = make_experts(family, kind).bfloat16()
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TD = torch.randn(num_tokens, WIDTH, generator=generator).bfloat16()
    weights_TK, experts_TK = torch.randn(num_tokens, NUM_EXPERTS, generator=generator).softmax(dim=1).topk(TOP_K)
    with torch.inference_mode():
        expected_TD = copy.deepcopy(module).float()(hidden_TD.float(), experts_TK, weights_TK)
        theirs_TD = module(hidden_TD, experts_TK, weights_TK)
        install(module, is_packed=is_packed)
        out_TD = module(hidden_TD, experts_TK, weights_TK)
    assert out_TD.dtype == torch.bfloat16
    allowed = 1.1 * (theirs_TD - expected_TD).abs().max() + 2**-8 * expected_TD.abs().max()
    assert (out_TD - expected_TD).abs().max() <= allowed


@pytest.mark.parametrize("is_packed", [False, True])
def test_another_ranks_tokens_leave_no_trace(is_packed: bool) -> None:
    """What is not a number stays with the token that has it, and one with no expert here gets nothing."""
    module = make_experts("qwen3_moe", Qwen3MoeExperts)
    install(module, is_packed=is_packed)
    nowhere = NUM_EXPERTS
    hidden_TD = torch.randn(3, WIDTH)
    hidden_TD[0] = float("nan")
    experts_TK = torch.tensor([[0, nowhere], [nowhere, nowhere], [nowhere, 1]])
    weights_TK = torch.full((3, 2), 0.5)
    with torch.inference_mode():
        out_TD = module(hidden_TD, experts_TK, weights_TK)
        alone_1D = module(hidden_TD[2:], experts_TK[2:], weights_TK[2:])
        nothing_1D = module(hidden_TD[1:2], experts_TK[1:2], weights_TK[1:2])
    assert out_TD[0].isnan().all()
    assert not out_TD[1].any()
    assert not nothing_1D.any()
    torch.testing.assert_close(out_TD[2:], alone_1D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_experts_are_read_and_written_one_by_one(dtype: torch.dtype, is_transposed: bool) -> None:
    weight = torch.randn(4, 24, 40).to(dtype)
    original, rows = weight.clone(), torch.randn(2, 24, 40).to(dtype)
    linear = ExpertLinear("linear", weight, None, is_transposed=is_transposed)
    linear.pack()
    weight.fill_(float("nan"))
    assert torch.equal(linear.read([3, 0]), original[[3, 0]])
    assert linear.read([]).shape == (0, 24, 40)
    linear.write([2, 1], rows)
    assert weight.isnan().all()
    expected = torch.stack([original[0], rows[1], rows[0], original[3]])
    assert torch.equal(linear.read(range(4)), expected)
    counts = [1, 2, 3, 1]
    x = torch.randn(sum(counts), 24 if is_transposed else 40).to(dtype)
    plain = torch.cat(
        [part @ (row if is_transposed else row.t()) for part, row in zip(x.split(counts), expected, strict=True)]
    )
    tolerances = {
        "rtol": 1.6e-2 if dtype == torch.bfloat16 else 1e-5,
        "atol": 1e-1 if dtype == torch.bfloat16 else 1e-4,
    }
    torch.testing.assert_close(linear(range(4), counts, x), plain, **tolerances)
    torch.testing.assert_close(linear([3], [1], x[-1:]), plain[-1:], **tolerances)
    linear.unpack()
    assert torch.equal(weight, expected)
