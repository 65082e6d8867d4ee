"""GGUF files, converted once into checkpoint directories.

A converted file loads in a fraction of a second and each rank reads only its part, whereas dequantising takes seconds
at every start. Tensors are converted one at a time, so that memory for the largest one is enough. No torch at import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import CheckpointError, UnsupportedModelError
from phalanx.models.gguf_file import GGUFFile, GGUFTensor
from phalanx.models.progress import Progress
from phalanx.models.weight_files import SINGLE, write_header

FORMAT = 3
"""Part of the cache's name. Raise it when the files that the conversion writes change."""


class Family(NamedTuple):
    """How a GGUF architecture is called in transformers."""

    architecture: str
    model_type: str
    experts: tuple[str, str, str, str] | None = None
    """Names in a layer of the router, and of one expert's gate, up and down matrices."""


_FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama"),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        ("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    ),
}
_MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    (
        "block_sparse_moe.gate",
        "block_sparse_moe.experts.{}.w1",
        "block_sparse_moe.experts.{}.w3",
        "block_sparse_moe.experts.{}.w2",
    ),
)
"""GGUF calls it llama, with experts."""

_SETTINGS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")

_LOST: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": (None, "none"),
    "rope.scaling.factor": (None, 0, 1),
    "rope.scale_linear": (None, 0, 1),
    "attention.sliding_window": (None, 0),
}
"""Settings that a converted checkpoint would lack, with the values that mean nothing."""

_ROPE_FACTORS = "rope_freqs.weight"
"""How Llama 3.1 and later scale their rotary embeddings."""

_CHUNK_BYTES = 64 << 20

_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def convert_once(file: Path, progress: Progress) -> Path:
    """The checkpoint directory made from a GGUF file; blocks while it is made, the first time.

    It appears under its name only when it is complete, whatever else converts the same file meanwhile. Weights become
    bfloat16, unless most of the file is float16 or float32.

    Raises CheckpointError if the `gguf` package is missing or the file is damaged, UnsupportedModelError if the file
    has an architecture, or a feature of one, that cannot be converted faithfully.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phalanx" / "gguf"
    try:
        target = cache / f"{_digest(file, progress)}-{FORMAT}"
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file}: to read GGUF files, install the package gguf: pip install 'phalanx[gguf]'")
    try:
        _convert_into(target, file, progress)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be converted into {cache} ({error}); XDG_CACHE_HOME moves it") from error
    return target


def _convert_into(target: Path, file: Path, progress: Progress) -> None:
    """Make `target`, whole or not at all."""
    cache = target.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=cache, ignore_cleanup_errors=True) as partial:
        _convert(file, Path(partial), progress)
        try:
            os.rename(partial, target)
        except OSError:
            if not target.is_dir():  # another process may have put the same there meanwhile
                raise


def _digest(file: Path, progress: Progress) -> str:
    size_bytes, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress("checking the GGUF file", stream.tell(), size_bytes)
    return digest.hexdigest()[:32]


def _convert(file: Path, directory: Path, progress: Progress) -> None:
    progress("reading the GGUF file", 0, 0)
    head = GGUFFile.read(file)
    _check_complete(file, head)
    family = _family(file, head)
    dtype = _dtype(head)
    config = _config(file, head, family, dtype)
    _check_nothing_is_lost(file, head, config["head_dim"])
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    eos = [head.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": sorted({token for token in eos if token is not None}),
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    _write_tokenizer(file, head, directory)
    _write_weights(file, head, family, dtype, directory / SINGLE, progress)


def _check_complete(file: Path, head: GGUFFile) -> None:
    num_parts = head.metadata.get("split.count", 1)
    if num_parts > 1:
        raise CheckpointError(f"{file} is one of {num_parts} parts: llama-gguf-split --merge makes one file of them")
    size_bytes = file.stat().st_size
    for tensor in head.tensors:
        if tensor.offset_bytes + math.prod(tensor.shape[:-1]) * _row_bytes(tensor) > size_bytes:
            raise CheckpointError(f"{file} is cut short: it ends before or within the tensor {tensor.name}")


def _row_bytes(tensor: GGUFTensor) -> int:
    """Bytes of one row as it is stored. Raises UnsupportedModelError for a type that `gguf` does not know."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    except ValueError as error:
        raise UnsupportedModelError(f"the GGUF tensor {tensor.name} has an unknown type: {error}") from error
    num_blocks = tensor.shape[-1] // int(block_elements)
    return num_blocks * int(block_bytes)


def _family(file: Path, head: GGUFFile) -> Family:
    architecture = head.metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(f"{file} is a {architecture}; supported GGUF files are {', '.join(_FAMILIES)}")
    if architecture == "llama" and head.metadata.get("llama.expert_count"):
        return _MIXTRAL
    return _FAMILIES[architecture]


def _check_nothing_is_lost(file: Path, head: GGUFFile, head_dim: int) -> None:
    """Raises UnsupportedModelError if the model computes something that the checkpoint could not say."""
    architecture = head.metadata["general.architecture"]
    expected = {f"{architecture}.{key}": values for key, values in _LOST.items()}
    expected[f"{architecture}.rope.dimension_count"] = (None, head_dim)
    found = [key for key, values in expected.items() if head.metadata.get(key) not in values]
    found += [tensor.name for tensor in head.tensors if tensor.name == _ROPE_FACTORS]
    if found:
        raise UnsupportedModelError(f"{file} has {found[0]}, which is not supported from a GGUF file")


def _config(file: Path, head: GGUFFile, family: Family, dtype: str) -> dict[str, Any]:
    architecture = head.metadata["general.architecture"]
    get = {name.removeprefix(f"{architecture}."): value for name, value in head.metadata.items()}.get
    shapes = {tensor.name: tensor.shape for tensor in head.tensors}
    config: dict[str, Any] = {name: get(key) for name, key in _SETTINGS.items()}
    if missing := [_SETTINGS[name] for name, value in config.items() if value is None]:
        raise CheckpointError(f"{file} does not say {architecture}.{missing[0]}")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file} has no tensor token_embd.weight")
    config |= {
        "num_key_value_heads": get("attention.head_count_kv", config["num_attention_heads"]),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "hidden_act": "silu",
        "head_dim": get("attention.key_length") or config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": get("rope.freq_base", 10000.0),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    if family.experts:
        config["num_local_experts"] = get("expert_count")
        config["num_experts_per_tok"] = get("expert_used_count")
        config["moe_intermediate_size"] = get("expert_feed_forward_length")
        config["norm_topk_prob"] = True  # llama.cpp always normalises
    return config


def _dtype(head: GGUFFile) -> str:
    """What most of the file is stored as, or bfloat16 if that is a quantised type."""
    from gguf import GGMLQuantizationType

    elements: Counter[int] = Counter()
    for tensor in head.tensors:
        elements[tensor.ggml_type] += math.prod(tensor.shape)
    ((most, _),) = elements.most_common(1)
    return {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}.get(most, "bfloat16")


def _write_tokenizer(file: Path, head: GGUFFile, directory: Path) -> None:
    # Not AutoTokenizer: to find the class it reads the file's whole head with the `gguf` package, for ten seconds.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, NotImplementedError, KeyError, OSError) as error:
        raise UnsupportedModelError(f"{file} has a tokenizer that transformers cannot read: {error}") from error
    # transformers 5.17 takes the token that begins a text for the one that ends it.
    for role, key in _SPECIAL_TOKENS.items():
        if (token_id := head.metadata.get(f"tokenizer.ggml.{key}")) is not None:
            setattr(tokenizer, role, head.metadata["tokenizer.ggml.tokens"][token_id])
    # It does not read these either. llama.cpp begins with BOS where a sentencepiece vocabulary does not say.
    is_sentencepiece = head.metadata.get("tokenizer.ggml.model") == "llama"
    tokenizer.add_bos_token = head.metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece)
    tokenizer.add_eos_token = head.metadata.get("tokenizer.ggml.add_eos_token", False)
    tokenizer.save_pretrained(directory)


def _write_weights(file: Path, head: GGUFFile, family: Family, dtype: str, target: Path, progress: Progress) -> None:
    names = {tensor.name: list(_names(file, tensor, family)) for tensor in head.tensors}
    shapes = {
        name: tensor.shape if len(names[tensor.name]) == 1 else tensor.shape[1:]
        for tensor in head.tensors
        for name in names[tensor.name]
    }
    size_bytes, done_bytes = file.stat().st_size, 0
    with file.open("rb") as source, target.open("wb") as sink:
        write_header(sink, shapes, dtype)
        for tensor in head.tensors:
            progress("converting the GGUF file", done_bytes, size_bytes)
            stored = _read(source, tensor)
            _write(sink, _undo_rotation(_dequantise(stored, tensor), tensor.name, head, family), dtype)
            done_bytes += stored.nbytes
    progress("converting the GGUF file", size_bytes, size_bytes)


def _names(file: Path, tensor: GGUFTensor, family: Family) -> Iterator[str]:
    """The names in the checkpoint of a tensor: one, or one for each expert, whose matrices follow one another."""
    stem, _, kind = tensor.name.rpartition(".")
    block, _, part = stem.rpartition(".")
    prefix = f"model.layers.{block.removeprefix('blk.')}."
    if stem in _TOP:
        yield f"{_TOP[stem]}.{kind}"
    elif part in _LAYER:
        yield f"{prefix}{_LAYER[part]}.{kind}"
    elif family.experts and part in _EXPERTS:
        name = family.experts[_EXPERTS.index(part)]
        yield from (f"{prefix}{name.format(expert)}.{kind}" for expert in range(tensor.shape[0] if "{}" in name else 1))
    else:
        raise UnsupportedModelError(f"{file} has a tensor {tensor.name}, which a {family.architecture} has no use for")


def _read(source: BinaryIO, tensor: GGUFTensor) -> NDArray[np.uint8]:
    """The tensor as it is stored: [rows, bytes of a row]."""
    row_bytes = _row_bytes(tensor)
    source.seek(tensor.offset_bytes)
    stored = np.fromfile(source, dtype=np.uint8, count=math.prod(tensor.shape[:-1]) * row_bytes)
    return stored.reshape(-1, row_bytes)


def _dequantise(stored: NDArray[np.uint8], tensor: GGUFTensor) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    weights: NDArray[np.float32] = dequantize(stored, GGMLQuantizationType(tensor.ggml_type)).astype(
        np.float32, copy=False
    )
    return weights.reshape(tensor.shape)


def _undo_rotation(weights: NDArray[np.float32], name: str, head: GGUFFile, family: Family) -> NDArray[np.float32]:
    """The rows of query and key projections in transformers' order.

    GGUF files of Llama have the two halves of each head interleaved, for another form of rotary embedding. Source:
    llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    if family.model_type not in ("llama", "mixtral") or not (".attn_q." in name or ".attn_k." in name):
        return weights
    num_heads = head.metadata["llama.attention.head_count"]
    if ".attn_k." in name:
        num_heads = head.metadata.get("llama.attention.head_count_kv", num_heads)
    halves = weights.reshape(num_heads, weights.shape[0] // num_heads // 2, 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _write(sink: BinaryIO, weights: NDArray[np.float32], dtype: str) -> None:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(weights)).to(getattr(torch, dtype))
    sink.write(tensor.view(torch.uint8).numpy().data)
