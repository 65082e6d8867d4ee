"""Packed weights: the same products, and plain weights again for whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.errors import UserError
from phalanx.models.checkpoint import resolve
from phalanx.models.model import CausalLM, WeightMemory, load_model
from phalanx.models.packed import Linear, Packing, Product, can_pack
from phalanx.moe.dispatcher import AllGatherReduceScatter
from phalanx.testing.checkpoints import FAMILIES, MIXTURES
from phalanx.testing.thread_group import ThreadGroup, run_ranks
from phalanx.topology.sharding import ExpertShare

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, paged.CPU)]
QUERY = "model.layers.0.self_attn.q_proj.weight"

pytestmark = pytest.mark.skipif(not DTYPES, reason="torch was built without oneDNN")


def make_layer(index: int, outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype) -> Linear:
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    return Linear(f"layer{index}", torch.randn(outputs, inputs).to(dtype), bias)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    inputs=st.integers(1, 130),
    outputs=st.lists(st.tuples(st.integers(1, 130), st.booleans()), min_size=1, max_size=3),
    num_tokens=st.integers(1, 40),
)
def test_a_packed_product_is_the_plain_one(
    dtype: torch.dtype, inputs: int, outputs: list[tuple[int, bool]], num_tokens: int
) -> None:
    torch.manual_seed(num_tokens)
    layers = [make_layer(i, size, inputs, has_bias, dtype) for i, (size, has_bias) in enumerate(outputs)]
    originals = [layer.weight.clone() for layer in layers]
    x = torch.randn(1, num_tokens, inputs).to(dtype)
    product = Product(*layers)
    expected = product(x)
    product.pack()
    for layer in layers:
        layer.weight.fill_(float("nan"))
    found = product(x)
    assert [tuple(part.shape) for part in found] == [(1, num_tokens, size) for size, _ in outputs]
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    product.unpack()
    assert all(torch.equal(layer.weight, original) for layer, original in zip(layers, originals, strict=True))
    assert all(torch.equal(mine, plain) for mine, plain in zip(product(x), expected, strict=True))


def test_only_what_is_packed_and_nobody_else_reads_is_released() -> None:
    names: list[str] = []
    products = [Product(make_layer(i, 8, 8, False, torch.float32)) for i in range(3)]
    packing = Packing(products, names.extend, kept="layer1.weight")
    packing.pack()
    packing.pack()
    assert names == ["layer0.weight", "layer2.weight"]
    assert packing.duplicate_bytes == products[1].layers[0].weight.nbytes


@pytest.mark.parametrize(("dtype", "device"), [(torch.float16, "cpu"), (torch.float32, "cuda"), (torch.int64, "cpu")])
def test_what_cannot_be_packed(dtype: torch.dtype, device: str) -> None:
    assert not can_pack(dtype, torch.device(device))


def last_logits(model: CausalLM) -> Tensor:
    run, sequence = paged.PagedRun(model), paged.Sequence([3, 1, 4, 1, 5, 9])
    run.step([(sequence, 4)])
    run.step([(sequence, 2)])
    return run.logits_of(sequence)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_packing_changes_no_logits(written: Any, family: str, num_ranks: int) -> None:
    path = written(family)

    def run(group: Group) -> tuple[Tensor, Tensor]:
        return last_logits(paged.load(path, group)), last_logits(paged.load(path, group, pack=False))

    for packed, plain in run_ranks(num_ranks, run):
        torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)


def one_rank(path: Path, **options: Any) -> CausalLM:
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    return paged.load(path, group, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_plain_weights_come_back(written: Any, family: str, tied: bool) -> None:
    path = written(family, tie_word_embeddings=tied)
    packed, plain = one_rank(path), one_rank(path, pack=False)
    last_logits(packed)
    found, expected = packed.named_parameters(), plain.named_parameters()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert packed.weight_bytes - plain.weight_bytes == (expected["lm_head.weight"].nbytes if tied else 0)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_new_weights_have_effect_in_the_next_step(written: Any, family: str, tied: bool, pack: bool) -> None:
    path = written(family, tie_word_embeddings=tied)
    model, expected = one_rank(path, pack=pack), one_rank(path, pack=False)
    before = last_logits(model)
    for changed in (model, expected):
        for name, tensor in changed.named_parameters().items():
            if "norm" not in name:
                tensor.copy_(tensor.roll(1, 0))
    after = last_logits(model)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, last_logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_move_packed_or_plain(written: Any, family: str) -> None:
    """Whether their weights are packed at the time, or lent."""
    path = written(family)
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    dispatcher = AllGatherReduceScatter(group, group)
    model = paged.load(path, group, experts=(ExpertShare(0, 1, is_even=True), dispatcher))
    original = {name: tensor.clone() for name, tensor in model.named_parameters().items() if ".experts." in name}
    expected = last_logits(model)

    def move(placement: list[int]) -> None:
        for experts in model.experts.values():
            experts.move(placement, group)

    move([2, 3, 1, 0])
    torch.testing.assert_close(last_logits(model), expected, rtol=0, atol=1e-5)
    for name, tensor in original.items():
        assert torch.equal(model.named_parameters()[name], tensor[[2, 3, 1, 0]]), name
    move([0, 1, 2, 3])
    torch.testing.assert_close(last_logits(model), expected, rtol=0, atol=1e-5)
    for name, tensor in original.items():
        assert torch.equal(model.named_parameters()[name], tensor), name


def test_packed_experts_are_released(written: Any) -> None:
    names: list[str] = []
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    load_model(
        resolve(str(written("mixtral"))),
        dtype=torch.float32,
        device=paged.CPU,
        group=group,
        memory=WeightMemory(paged.nan_like, release=names.extend),
        on_progress=lambda done, total: None,
    )
    for leaf in ("gate_up_proj", "down_proj"):
        assert f"model.layers.0.mlp.experts.{leaf}" in names


def test_weights_written_too_late_are_an_error(written: Any) -> None:
    model = one_rank(written("llama"))
    weight = model.named_parameters()[QUERY]
    norm = model.named_parameters()["model.norm.weight"]
    last_logits(model)
    assert weight.numel() == 0
    norm.mul_(2)  # is packed nowhere
    last_logits(model)
    weight.fill_(1.0)
    with pytest.raises(UserError, match=rf"{QUERY} was written to after a step began"):
        last_logits(model)


def test_a_part_of_a_weight_written_too_late_is_an_error(written: Any) -> None:
    model = one_rank(written("llama"))
    row = model.named_parameters()[QUERY][0]
    last_logits(model)
    row.fill_(1.0)
    with pytest.raises(UserError, match=QUERY):
        last_logits(model)
