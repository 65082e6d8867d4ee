"""Packed weights that several processes have: here several models over the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import models_paged as paged
import pytest
import torch
from torch import Tensor

from phalanx.memory.arena import Arena
from phalanx.models.checkpoint import resolve
from phalanx.models.model import CausalLM, WeightMemory, load_model
from phalanx.models.packed import can_pack
from phalanx.models.packed_memory import PackedPlace
from phalanx.testing.thread_group import ThreadGroup

pytestmark = pytest.mark.skipif(not can_pack(torch.float32, paged.CPU), reason="torch was built without oneDNN")

FAMILIES = ["llama", "qwen2", "mixtral", "gpt_oss"]
"""Plain, with biases, with experts, with experts that have biases and are transposed."""


@pytest.fixture
def arenas() -> Iterator[Arenas]:
    with Arenas() as arenas:
        yield arenas


class Arenas(ExitStack):
    """Loads models, each after the first into the memory of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Arena | None = None

    def load(self, path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
        (group,) = ThreadGroup.make(1, timeout_s=1.0)
        held = self.last.describe() if self.last is not None else None
        self.last = self.enter_context(Arena("test", paged.CPU, held))
        return load_model(
            resolve(str(path)),
            dtype=dtype,
            device=paged.CPU,
            group=group,
            memory=WeightMemory(
                self.last.allocate,
                release=self.last.release,
                filled={name: region.size_bytes for name, region in self.last.held.items()},
                shares_packed=True,
            ),
            on_progress=lambda done, total: None,
        )


def last_logits(model: CausalLM) -> Tensor:
    run, sequence = paged.PagedRun(model), paged.Sequence([3, 1, 4, 1, 5, 9])
    run.step([(sequence, 4)])
    run.step([(sequence, 2)])
    return run.logits_of(sequence)


def plain(path: Path) -> CausalLM:
    (group,) = ThreadGroup.make(1, timeout_s=1.0)
    return paged.load(path, group, pack=False)


def change(model: CausalLM) -> None:
    """Write to every weight, and to biases."""
    for name, tensor in model.named_parameters().items():
        if "norm" not in name:
            tensor.copy_(tensor.roll(1, 0))


@pytest.fixture
def never_packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is packed after all."""
    packed: list[str] = []
    keep = PackedPlace.keep

    def noting(place: PackedPlace, index: int, tensor: Tensor) -> Tensor:
        packed.append(place._names[0])
        return keep(place, index, tensor)

    monkeypatch.setattr(PackedPlace, "keep", noting)
    return packed


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype, paged.CPU)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_packs_nothing(
    written: Any, arenas: Arenas, never_packed: list[str], family: str, dtype: torch.dtype
) -> None:
    path = written(family)
    first = arenas.load(path, dtype)
    expected = last_logits(first)
    assert never_packed
    never_packed.clear()
    second = arenas.load(path, dtype)
    assert torch.equal(last_logits(second), expected)
    assert not never_packed
    parameters = second.named_parameters()
    for name, tensor in plain(path).named_parameters().items():
        assert torch.equal(parameters[name], tensor.to(dtype)), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_has_written_to_weights_the_other_computes_with(
    written: Any, arenas: Arenas, family: str, tied: bool
) -> None:
    """Also if it had taken them over before, and whether the writer has stepped since or not."""
    path = written(family, tie_word_embeddings=tied)
    first, expected = arenas.load(path), plain(path)
    second = arenas.load(path)
    before = last_logits(second)
    for has_stepped in (True, False):
        for model in (first, expected):
            change(model)
        if has_stepped:
            last_logits(first)
        after = last_logits(second)
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(after, last_logits(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(last_logits(arenas.load(path)), after, rtol=0, atol=0)


class Killed(BaseException):
    """The first one does no more."""


@pytest.mark.parametrize("num_done", [0, 1, 5])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_one_is_killed_while_it_packs(
    written: Any, arenas: Arenas, monkeypatch: pytest.MonkeyPatch, family: str, num_done: int
) -> None:
    """Half of a packed weight is written then."""
    path = written(family)
    first, expected = arenas.load(path), plain(path)
    ready = arenas.load(path)
    for model in (first, expected):
        change(model)
    keep, left = PackedPlace.keep, [num_done]

    def keep_some(place: PackedPlace, index: int, tensor: Tensor) -> Tensor:
        if left[0] == 0:
            assert place._bytes is not None
            place._bytes[index, place._bytes.shape[1] // 2 :].fill_(77)
            raise Killed
        left[0] -= 1
        return keep(place, index, tensor)

    monkeypatch.setattr(PackedPlace, "keep", keep_some)
    with pytest.raises(Killed):
        last_logits(first)
    monkeypatch.undo()
    for model in (arenas.load(path), ready):
        torch.testing.assert_close(last_logits(model), last_logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_done", [0, 1, 5])
def test_one_is_killed_while_it_unpacks(
    written: Any, arenas: Arenas, monkeypatch: pytest.MonkeyPatch, num_done: int
) -> None:
    path = written("mixtral")
    first = arenas.load(path)
    ready = arenas.load(path)
    expected = last_logits(first)
    to_dense, left = Tensor.to_dense, [num_done]

    def to_dense_some(tensor: Tensor) -> Tensor:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return to_dense(tensor)

    monkeypatch.setattr(Tensor, "to_dense", to_dense_some)
    with pytest.raises(Killed):
        first.named_parameters()
    monkeypatch.undo()
    for model in (ready, arenas.load(path)):
        torch.testing.assert_close(last_logits(model), expected, rtol=0, atol=1e-5)


def test_whoever_gets_ready_leaves_alone_what_another_has_lent(written: Any, arenas: Arenas) -> None:
    path = written("llama")
    first = arenas.load(path)
    lent = {name: tensor.clone() for name, tensor in first.named_parameters().items()}
    arenas.load(path)
    for name, tensor in first.named_parameters().items():
        assert torch.equal(tensor, lent[name]), name
