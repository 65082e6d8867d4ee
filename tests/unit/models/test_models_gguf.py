"""A GGUF file becomes a checkpoint with the same weights, settings and tokenizer, once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import models_paged as paged
import numpy as np
import pytest
import torch
from torch import Tensor

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.checkpoint import resolve
from phalanx.testing.checkpoints import write_checkpoint
from phalanx.testing.thread_group import run_ranks

gguf = pytest.importorskip("gguf")

NAMES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Rows of whole blocks of 32, which quantised types want."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phalanx" / "gguf"


def write_gguf(
    path: Path, source: Path, family: str, kind: Any, tensors: dict[str, Tensor] | None = None, **extra: Any
) -> Path:
    """Write a checkpoint of transformers as GGUF, in the way of llama.cpp's converter.

    In names of `extra` metadata __ is a dot, and NAME the architecture.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, name = model.config, NAMES[family]
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    for key, value in extra.items():
        add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](key.replace("__", ".").replace("NAME", name), value)
    add_tokenizer(writer, source)
    for key, tensor in {**stored_tensors(model.state_dict(), config, name), **(tensors or {})}.items():
        weights = tensor.numpy()
        is_matrix = weights.ndim > 1
        stored = gguf.quantize(weights, kind) if is_matrix else weights
        writer.add_tensor(key, stored, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocab = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    # A byte-level vocabulary must have merges: their tokens take the places of <pad> and <unk>.
    merges = [(tokens[0], tokens[1]), (tokens[2], tokens[3])]
    tokens[-2:] = [left + right for left, right in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def stored_tensors(weights: dict[str, Tensor], config: Any, name: str) -> dict[str, Tensor]:
    names = gguf.get_tensor_name_map(
        next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name), config.num_hidden_layers
    )
    stored = {}
    for key, tensor in weights.items():
        stem, _, suffix = key.rpartition(".")
        if key.endswith("experts.gate_up_proj"):
            block = key.split(".")[2]
            stored[f"blk.{block}.ffn_gate_exps.weight"], stored[f"blk.{block}.ffn_up_exps.weight"] = (
                half.contiguous() for half in tensor.chunk(2, dim=1)
            )
        elif key.endswith("experts.down_proj"):
            stored[f"blk.{key.split('.')[2]}.ffn_down_exps.weight"] = tensor
        elif key.endswith("mlp.gate.weight"):
            stored[f"blk.{key.split('.')[2]}.ffn_gate_inp.weight"] = tensor
        else:
            if name == "llama" and ("q_proj" in key or "k_proj" in key):
                num_heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
                halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
            stored[f"{names.get_name(stem)}.{suffix}"] = tensor
    return stored


def logits_of(path: Path) -> Tensor:
    (run,) = run_ranks(1, lambda group: paged.PagedRun(paged.load(path, group)))
    sequence = paged.Sequence(list(range(50)))
    run.step([(sequence, 50)])
    return run.logits_of(sequence)


@pytest.mark.parametrize("family", NAMES)
def test_converted_weights_are_the_same(tmp_path: Path, family: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 4e3}
    source = write_checkpoint(tmp_path / "source", family, rope_parameters=rope, **SHAPE)
    file = write_gguf(tmp_path / "model.gguf", source, family, gguf.GGMLQuantizationType.F32)
    seen: list[tuple[str, int, int]] = []
    checkpoint = resolve(str(file), progress=lambda *state: seen.append(state))
    assert checkpoint.architecture == resolve(str(source)).architecture
    assert checkpoint.dtype == "float32"
    torch.testing.assert_close(logits_of(checkpoint.path), logits_of(source), rtol=0, atol=1e-5)
    assert seen[-1] == ("converting the GGUF file", file.stat().st_size, file.stat().st_size)


@pytest.mark.parametrize(
    ("kind", "dtype", "error"), [("Q8_0", "bfloat16", 0.02), ("Q4_1", "bfloat16", 0.1), ("F16", "float16", 0.001)]
)
def test_quantised_weights_are_close(tmp_path: Path, kind: str, dtype: str, error: float) -> None:
    from safetensors.torch import load_file

    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType[kind])
    checkpoint = resolve(str(file))
    assert checkpoint.dtype == dtype
    found, expected = (load_file(path / "model.safetensors") for path in (checkpoint.path, source))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].float() - tensor).abs().max() <= error * tensor.abs().max()


def test_tokenizer_and_end_of_text_come_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    path = resolve(str(write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.Q8_0))).path
    tokenizer, original = (AutoTokenizer.from_pretrained(folder) for folder in (path, source))
    assert tokenizer.decode(tokenizer("plain words").input_ids) == "plain words"
    assert tokenizer.eos_token == original.convert_ids_to_tokens(257)
    assert json.loads((path / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": [257]}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, [97]),
        ({"add_bos_token": True}, [256, 97]),
        ({"add_bos_token": False, "add_eos_token": True}, [97, 257]),
    ],
)
def test_what_stands_around_a_prompt_comes_along(
    tmp_path: Path, metadata: dict[str, bool], expected: list[int]
) -> None:
    from transformers import AutoTokenizer

    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    extra = {f"tokenizer__ggml__{name}": value for name, value in metadata.items()}
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.F32, **extra)
    letter = AutoTokenizer.from_pretrained(source)("a").input_ids
    ids = [letter[-1] if token_id == 97 else token_id for token_id in expected]
    assert AutoTokenizer.from_pretrained(resolve(str(file)).path)("a").input_ids == ids


def test_a_file_is_converted_once(tmp_path: Path, cache: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.Q8_0)
    first = resolve(str(file)).path
    written_at = (first / "model.safetensors").stat().st_mtime_ns
    moved = file.rename(tmp_path / "other-name.gguf")
    assert resolve(str(moved)).path == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written_at
    assert list(cache.iterdir()) == [first]


def test_a_link_may_lead_to_a_file_without_the_suffix(tmp_path: Path, cache: Path) -> None:
    """As the hub's cache has them."""
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    blob = write_gguf(tmp_path / "blob.gguf", source, "llama", gguf.GGMLQuantizationType.Q8_0)
    (tmp_path / "model.gguf").symlink_to(blob.rename(tmp_path / "0123456789abcdef"))
    assert resolve(str(tmp_path / "model.gguf")).architecture == "LlamaForCausalLM"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.F32)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        resolve(str(file))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"no model at all" * 10])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
        resolve(str(file))


@pytest.mark.parametrize(
    ("metadata", "tensors", "feature"),
    [
        ({"NAME__rope__scaling__type": "yarn"}, {}, r"llama\.rope\.scaling\.type"),
        ({"NAME__rope__scaling__factor": 4.0}, {}, r"llama\.rope\.scaling\.factor"),
        ({"NAME__rope__scale_linear": 4.0}, {}, r"llama\.rope\.scale_linear"),
        ({"NAME__rope__dimension_count": 8}, {}, r"llama\.rope\.dimension_count"),
        ({"NAME__attention__sliding_window": 4096}, {}, r"llama\.attention\.sliding_window"),
        ({}, {"rope_freqs.weight": torch.ones(8)}, r"rope_freqs\.weight"),
    ],
)
def test_features_that_would_be_lost_are_refused(
    tmp_path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor], feature: str
) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.F32, tensors, **metadata)
    with pytest.raises(UnsupportedModelError, match=f"has {feature}, which is not supported from a GGUF file"):
        resolve(str(file))


def test_settings_that_mean_nothing_are_accepted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    metadata = {
        "NAME__rope__scaling__type": "none",
        "NAME__rope__scaling__factor": 1.0,
        "NAME__rope__dimension_count": 16,
        "split__count": 1,
    }
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.F32, **metadata)
    assert resolve(str(file)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("shape", [{"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}])
def test_llamas_of_other_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    source = write_checkpoint(tmp_path / "source", "llama", rope_parameters=rope, **{**SHAPE, **shape})
    randomise_biases(source)
    file = write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.F32)
    torch.testing.assert_close(logits_of(resolve(str(file)).path), logits_of(source), rtol=0, atol=1e-5)


def randomise_biases(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = source / "model.safetensors"
    tensors = {name: torch.randn_like(x) if name.endswith("bias") else x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", **SHAPE)
    file = write_gguf(tmp_path / "m.gguf", source, "llama", gguf.GGMLQuantizationType.F32, split__count=3)
    with pytest.raises(CheckpointError, match="one of 3 parts: llama-gguf-split --merge"):
        resolve(str(file))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="is a gpt2; supported GGUF files are llama"):
        resolve(str(tmp_path / "model.gguf"))


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'phalanx\[gguf\]'"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to("/proc/self/mem")  # what may not be read, tests that run as root can read
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        resolve(str(tmp_path / "model.gguf"))
