"""Experts that stay in 4 bits compute what the same checkpoint dequantised does, whichever part of them a rank has.

The kernel is for GPUs: here torch's own operations stand in for it. tests/unit/moe/test_moe_four_bits_triton.py
compares the two.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models_paged as paged
import moe_four_bits as oracle
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from phalanx.collectives.group import Group
from phalanx.collectives.single import SingleGroup
from phalanx.collectives.spec import GroupSpec
from phalanx.errors import UserError
from phalanx.models.checkpoint import resolve
from phalanx.models.model import CausalLM
from phalanx.moe import four_bits
from phalanx.moe.dispatcher import AllGatherReduceScatter
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.quantised import (
    AWQ_CONFIG,
    Quantise,
    as_awq,
    as_compressed,
    compressed_config,
    quantise_checkpoint,
    save,
)
from phalanx.testing.thread_group import run_ranks
from phalanx.topology.sharding import ExpertShare

pytestmark = pytest.mark.usefixtures("one_thread", "as_on_a_gpu")

GROUP, HIDDEN, INNER, NUM_EXPERTS = 64, 64, 192, 4
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
}
EXPERTS = "model.layers.0.mlp.experts"
TOKEN_IDS = list(range(50))


def as_channels(stem: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return as_compressed(stem, weight_OI, group_size=weight_OI.shape[1], symmetric=True)


FORMS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "awq": (partial(as_awq, group_size=GROUP), {**AWQ_CONFIG, "group_size": GROUP}),
    "asymmetric": (
        partial(as_compressed, group_size=GROUP),
        compressed_config(weights={"symmetric": False, "group_size": GROUP}),
    ),
    "symmetric": (
        partial(as_compressed, group_size=GROUP, symmetric=True),
        compressed_config(weights={"group_size": GROUP}),
    ),
    "by channel": (as_channels, compressed_config(weights={"strategy": "channel", "group_size": None})),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bits, "can_multiply", lambda device: True)
    monkeypatch.setattr(four_bits, "warm_up", lambda weight, dtype: None)
    monkeypatch.setattr(four_bits, "grouped_linear", oracle.reference)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a mixture in one of the forms."""

    def write(form: str | tuple[Quantise, dict[str, Any]], family: str = "qwen3_moe", **shape: Any) -> Path:
        path = write_checkpoint(tmp_path_factory.mktemp("model"), family, **{**SHAPE, **shape})
        quantise_checkpoint(path, path / "plain", *(FORMS[form] if isinstance(form, str) else form))
        return path

    return write


def one_rank_alone() -> SingleGroup:
    return SingleGroup(GroupSpec("alone", "single", (0,), epoch=1, timeout_s=1.0, join_timeout_s=1.0))


def load(path: Path, group: Group, *, whole_experts: bool = False, num_redundant: int = 0, **settings: Any) -> CausalLM:
    experts = None
    if whole_experts:
        share = ExpertShare(group.rank, group.size, num_redundant, is_even=num_redundant > 0)
        experts = share, AllGatherReduceScatter(one_rank_alone(), group)
    return paged.load(path, group, experts=experts, **{"dequantise": False, **settings})


def logits(model: CausalLM) -> Tensor:
    run, sequence = paged.PagedRun(model), paged.Sequence(TOKEN_IDS)
    run.step([(sequence, 20)])
    run.step([(sequence, sequence.num_left)])
    return run.logits_of(sequence)


def check(path: Path, num_ranks: int, **settings: Any) -> list[tuple[str, ...]]:
    """Returns what of the experts each rank has in 4 bits."""

    def body(group: Group) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        model = load(path, group, **settings)
        return logits(model), logits(load(path, group, dequantise=True)), tuple(sorted(model._in_four_bits))

    ranks = run_ranks(num_ranks, body)
    for found, expected, _ in ranks:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return [in_four_bits for _, _, in_four_bits in ranks]


BOTH = (f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj")


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_they_stand_for_is_what_runs(quantised: Callable[..., Path], form: str, whole_experts: bool) -> None:
    """Over two ranks a part of each expert has one and a half groups of the second matrix, over three one."""
    path = quantised(form)
    for num_ranks in (1, 2, 3):
        assert check(path, num_ranks, whole_experts=whole_experts) == [BOTH] * num_ranks


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "deepseek_v3", "glm4_moe", "olmoe"])
def test_families(quantised: Callable[..., Path], family: str) -> None:
    """Shared experts and attention are dequantised as ever."""
    latents = {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16} if family == "deepseek_v3" else {}
    assert all(len(found) == 2 for found in check(quantised("awq", family, **latents), 2))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_memory(quantised: Callable[..., Path], form: str) -> None:
    """Numbers take half a byte, scales keep their type, and progress and `weight_bytes` count what is there."""
    path = quantised(form)

    def body(group: Group) -> tuple[CausalLM, CausalLM]:
        return load(path, group, dtype=torch.bfloat16, pack=False), load(
            path, group, dtype=torch.bfloat16, pack=False, dequantise=True
        )

    model, dequantised = run_ranks(1, body)[0]
    experts = model._definition.get_submodule(EXPERTS)
    parameters = dict(experts.named_parameters())
    assert parameters["gate_up_proj_numbers"].dtype == parameters["down_proj_numbers"].dtype == torch.uint8
    assert parameters["gate_up_proj_numbers"].shape == (NUM_EXPERTS, 2 * INNER, HIDDEN // 2)
    groups = INNER // GROUP if form != "by channel" else 1
    assert parameters["down_proj_scales"].shape == (NUM_EXPERTS, groups, HIDDEN)
    assert parameters["down_proj_scales"].dtype == torch.float16
    assert ("down_proj_zeros" in parameters) == (form in ("awq", "asymmetric"))
    plain = dict(dequantised._definition.get_submodule(EXPERTS).named_parameters())
    saved = sum(tensor.nbytes for tensor in plain.values()) - sum(tensor.nbytes for tensor in parameters.values())
    assert dequantised.weight_bytes - model.weight_bytes == saved > 0
    for name, tensor in plain.items():
        torch.testing.assert_close(oracle.unpacked(getattr(experts, name)), tensor.float(), rtol=1e-2, atol=0)


def test_experts_that_move(quantised: Callable[..., Path]) -> None:
    """Copies begin on two ranks, and all change places: everything that an expert has goes with it."""
    path = quantised("awq")
    first, second = [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]

    def body(group: Group) -> tuple[Tensor, Tensor]:
        model = load(path, group, whole_experts=True, num_redundant=2)
        before = logits(model)
        (experts,) = model.experts.values()
        with torch.inference_mode():
            experts.move(second, group)
        assert experts.mine == tuple(second[3 * group.rank : 3 * group.rank + 3]) != tuple(first[:3])
        return before, logits(model)

    for before, after in run_ranks(2, body):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_they_cannot_be_asked_for(quantised: Callable[..., Path]) -> None:
    path = quantised("awq")
    model = run_ranks(1, lambda group: load(path, group))[0]
    plain = run_ranks(1, lambda group: load(path, group, dequantise=True))[0].named_parameters()
    parameters = model.named_parameters()
    assert set(parameters) == set(plain)
    assert len(parameters) == len(plain)
    for name, tensor in plain.items():
        assert name in parameters
        if name not in BOTH:
            assert torch.equal(parameters[name], tensor)
            continue
        for ask in (parameters.__getitem__, parameters.get):
            with pytest.raises(UserError, match=f"{name} is held in 4 bits, .*--dequantise-weights"):
                ask(name)
    with pytest.raises(UserError, match="is held in 4 bits"):
        list(parameters.values())
    with pytest.raises(KeyError):
        parameters["nothing"]


SMALL_GROUPS = (as_awq, AWQ_CONFIG)
REORDERED = (
    partial(as_compressed, group_size=GROUP, reordered=True),
    compressed_config(weights={"group_size": GROUP, "actorder": "group"}),
)


@pytest.mark.parametrize(
    ("form", "shape", "kept", "reason"),
    [
        (SMALL_GROUPS, {}, [()], "groups of 16 inputs, where a multiple of 32 can stay"),
        (REORDERED, {}, [(), ()], "weight_g_idx"),
        (
            "awq",
            {},
            [BOTH[1:]] * 4 + [BOTH],
            r"40 up to 80, do not .* multiples of 32: --enable-expert-parallel or",
        ),
        (
            (as_channels, FORMS["by channel"][1]),
            {"moe_intermediate_size": 8},
            [BOTH[1:]] * 2,
            "groups of 8 inputs",
        ),
    ],
)
def test_what_cannot_stay_is_dequantised_and_said(
    quantised: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    form: Any,
    shape: dict[str, int],
    kept: list[tuple[str, ...]],
    reason: str,
) -> None:
    """By each rank for itself. The last one's parts of gate and up are padded."""
    caplog.set_level(logging.WARNING, logger="phalanx.models.four_bit_experts")
    assert check(quantised(form, **shape), len(kept)) == kept
    assert len(caplog.messages) == sum(found != BOTH for found in kept)
    assert all(text.startswith("experts in 4 bits are dequantised") for text in caplog.messages)
    assert any(re.search(reason, text) for text in caplog.messages), caplog.messages


def test_experts_that_are_not_alike(quantised: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = quantised("asymmetric")
    tensors = load_file(path / "model.safetensors")
    plain = load_file(path / "plain" / "model.safetensors")
    stem = f"{EXPERTS}.1.down_proj"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(stem)}
    save(path, {**tensors, f"{stem}.weight": plain[f"{stem}.weight"]})
    assert check(path, 2) == [BOTH[1:]] * 2
    assert "down_proj (some of these experts are not quantised)" in caplog.messages[0]
    caplog.clear()
    parts, _ = as_compressed(stem, plain[f"{stem}.weight"], group_size=GROUP, symmetric=True)
    save(path, {**tensors, **parts})
    assert check(path, 2) == [BOTH[1:]] * 2
    assert "down_proj (groups or zero points are not alike in all experts)" in caplog.messages[0]


def test_without_triton(
    quantised: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(four_bits, "can_multiply", lambda device: False)
    assert check(quantised("awq"), 1) == [()]
    assert "there is no Triton here" in caplog.messages[0]


def test_only_experts_count(tmp_path: Path, quantised: Callable[..., Path]) -> None:
    dense = write_checkpoint(tmp_path, "llama", hidden_size=64, intermediate_size=64)
    quantise_checkpoint(dense, dense / "plain", *FORMS["awq"])
    assert not resolve(str(dense)).has_experts_in_four_bits
    assert check(dense, 1) == [()]
    path = quantised("symmetric")
    assert resolve(str(path)).has_experts_in_four_bits
    assert not resolve(str(path / "plain")).has_experts_in_four_bits
    assert json.loads((path / "config.json").read_text())["quantization_config"]
