"""Weights are told apart in milliseconds, without reading them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phalanx.errors import CheckpointError
from phalanx.models import fingerprint
from phalanx.models.checkpoint import resolve
from phalanx.models.quantisation import QuantisedInfo
from phalanx.models.weight_files import read_headers, write_header
from phalanx.testing.checkpoints import write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "mixtral")


def print_of(directory: Path) -> bytes:
    return resolve(str(directory)).fingerprint


def change(directory: Path, tensor: str) -> None:
    """As training does: every number of the tensor is a little different."""
    info = read_headers(directory)[tensor]
    with info.file.open("r+b") as file:
        file.seek(info.offset_bytes)
        content = file.read(info.num_bytes)
        file.seek(info.offset_bytes)
        file.write(bytes(byte ^ 1 for byte in content))


def test_a_copy_has_the_same(directory: Path, tmp_path: Path) -> None:
    again = write_checkpoint(tmp_path / "again", "mixtral")
    assert print_of(directory) == print_of(again)
    assert print_of(directory) != print_of(write_checkpoint(tmp_path / "other", "mixtral", seed=1))


def test_it_does_not_matter_which_file_a_tensor_is_in(directory: Path, tmp_path: Path) -> None:
    tensors = read_headers(directory)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((directory / "config.json").read_bytes())
    for number, (name, info) in enumerate(tensors.items()):
        with (sharded / f"{number}.safetensors").open("wb") as file:
            write_header(file, {name: info.shape}, "float32")
            file.write(info.file.read_bytes()[info.offset_bytes :][: info.num_bytes])
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(resolve(str(sharded)).weight_files) == len(tensors)
    assert print_of(sharded) == print_of(directory)


def assert_any_tensor_tells(directory: Path) -> None:
    seen = {print_of(directory)}
    for name in read_headers(directory):
        change(directory, name)
        seen.add(print_of(directory))
    assert len(seen) == 1 + len(read_headers(directory))


def test_a_change_of_any_one_tensor_tells(directory: Path) -> None:
    assert_any_tensor_tells(directory)


def test_a_change_of_any_part_of_a_quantised_matrix_tells(directory: Path) -> None:
    file, stem = directory / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = load_file(file)
    num_outputs, num_inputs = tensors.pop(f"{stem}.weight").shape
    tensors[f"{stem}.qweight"] = torch.zeros(num_inputs, num_outputs // 8, dtype=torch.int32)
    tensors[f"{stem}.qzeros"] = torch.zeros(num_inputs // 8, num_outputs // 8, dtype=torch.int32)
    tensors[f"{stem}.scales"] = torch.ones(num_inputs // 8, num_outputs, dtype=torch.float16)
    save_file(tensors, file)
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(settings))
    assert isinstance(resolve(str(directory)).tensors[f"{stem}.weight"], QuantisedInfo)
    assert_any_tensor_tells(directory)


def test_another_setting_tells(directory: Path) -> None:
    before = print_of(directory)
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(settings.items()))))
    assert print_of(directory) == before, "the same settings in another order"
    file.write_text(json.dumps({**settings, "rms_norm_eps": 0.125}))
    assert print_of(directory) != before


def test_many_tensors_are_sampled_everywhere_and_of_every_kind() -> None:
    kinds = ("gate_proj", "up_proj", "down_proj")
    names = [f"layers.{i // 384}.experts.{i % 384 // 3}.{kinds[i % 3]}" for i in range(48 * 384)]
    sample = fingerprint._sample(names)
    assert len(sample) == len(set(sample)) == fingerprint.MAX_PAGES
    assert {name.split(".")[1] for name in sample} == {str(layer) for layer in range(48)}
    assert {name.split(".")[3] for name in sample} == {str(expert) for expert in range(128)}
    for kind in kinds:
        assert sum(name.endswith(kind) for name in sample) > fingerprint.MAX_PAGES / 4


def test_tens_of_gigabytes_take_no_time(tmp_path: Path) -> None:
    """Files with holes: what they take is the reads."""
    shapes = {f"model.layers.{i}.weight": (4096, 4096) for i in range(800)}
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sink:
        write_header(sink, shapes, "bfloat16")
        sink.truncate(sink.tell() + 800 * 4096 * 4096 * 2)
    assert file.stat().st_size > 26e9
    tensors = read_headers(tmp_path)
    began_at = time.process_time()
    fingerprint.fingerprint({}, tensors)
    assert time.process_time() - began_at < 0.1


def test_the_experts_of_a_large_mixture_take_no_time(directory: Path) -> None:
    info = next(iter(read_headers(directory).values()))
    tensors = {f"layers.{i // 384}.experts.{i % 384}.weight": info for i in range(48 * 384)}
    began_at = time.process_time()
    fingerprint.fingerprint({}, tensors)
    assert time.process_time() - began_at < 0.1


def test_a_file_that_cannot_be_read_is_named(directory: Path) -> None:
    tensors = read_headers(directory)
    os.unlink(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        fingerprint.fingerprint({}, tensors)
