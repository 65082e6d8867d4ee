"""From what the user calls a model to a checkpoint directory that is known to be complete and supported.

Importing this module brings in neither torch nor transformers, so that a wrong name is refused in milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from phalanx.config import Positive
from phalanx.errors import CheckpointError, ConfigError, UnsupportedModelError
from phalanx.models.fingerprint import fingerprint
from phalanx.models.hub import fetch
from phalanx.models.progress import Progress
from phalanx.models.quantisation import INT4, QuantisedInfo, StoredTensor, join_parts, layout_of
from phalanx.models.weight_files import DTYPES, TensorInfo, read_headers

SUPPORTED_ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings. transformers recomputes `dynamic` and `longrope` from the longest position in the batch: with them
a request's tokens would depend on what else runs."""

_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "DeepseekV2ForCausalLM": {
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "moe_layer_freq": (1,),
    },
    "DeepseekV3ForCausalLM": {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "moe_layer_freq": (1,)},
    "MiniMaxM2ForCausalLM": {
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
    },
}
"""Settings of which transformers' definition computes these values only, whatever config.json says."""


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    factor: Annotated[float, msgspec.Meta(gt=0)] | None = None
    original_max_position_embeddings: Positive | None = None

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


class _Settings(msgspec.Struct):
    """What must be true of config.json wherever it says something, so that it can be relied on."""

    architectures: list[str] | None = None
    max_position_embeddings: Positive | None = None
    vocab_size: Positive | None = None
    num_hidden_layers: Positive | None = None
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    hidden_size: Positive | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors files, of a supported architecture."""

    path: Path
    name: str
    """What the user called it."""

    @cached_property
    def hf_config(self) -> Any:
        """The transformers PretrainedConfig, which knows the defaults of what config.json leaves out.

        Raises CheckpointError if transformers does not accept config.json.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
            raise CheckpointError(f"{self.path / 'config.json'} is not accepted by transformers: {error}") from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json as it stands. Raises CheckpointError."""
        file = self.path / "config.json"
        try:
            settings = json.loads(file.read_text())
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.name} is no checkpoint: it has no config.json") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        try:
            msgspec.convert(settings, _Settings)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return dict(settings)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The checkpoint's tensors by name, quantised matrices among them.

        Raises CheckpointError, or UnsupportedModelError for a quantisation that is not known.
        """
        quantization = self.settings.get("quantization_config")
        return join_parts(self._headers, layout_of(self.name, quantization)) if quantization else {**self._headers}

    @cached_property
    def _headers(self) -> dict[str, TensorInfo]:
        """The tensors of the checkpoint's files as they are stored."""
        return read_headers(self.path)

    @cached_property
    def fingerprint(self) -> bytes:
        """The same for the same weights and config.json, another one for fine-tunes. Raises CheckpointError."""
        return fingerprint(self.settings, self._headers)

    @property
    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type, by safetensors' name, and shape of every tensor as it is stored. Raises CheckpointError."""
        return {name: (info.dtype, info.shape) for name, info in self._headers.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        return tuple(sorted({tensor.file for tensor in self._headers.values()}))

    @property
    def architecture(self) -> str:
        """The name of the model's class in transformers, such as "LlamaForCausalLM"."""
        return str(self.settings["architectures"][0])

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that the model was made for, in tokens.

        That is max_position_embeddings, unless YaRN stretches it: model cards (Qwen's) tell users to switch YaRN on and
        leave max_position_embeddings as it is.
        """
        stated, rope = int(self._setting("max_position_embeddings")), self._rope
        if rope.kind != "yarn" or rope.factor is None:
            return stated
        return max(stated, int(rope.factor * (rope.original_max_position_embeddings or stated)))

    @property
    def vocab_size(self) -> int:
        return int(self._setting("vocab_size"))

    @property
    def num_layers(self) -> int:
        return int(self._setting("num_hidden_layers"))

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 if the model is no mixture of experts."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        found = (getattr(self.hf_config, name, None) for name in names)
        return int(next((number for number in found if number), 0))

    @property
    def has_experts_in_four_bits(self) -> bool:
        """Whether single experts' matrices are stored in AWQ or compressed-tensors."""
        return any(
            isinstance(tensor, QuantisedInfo) and tensor.layout in INT4 and re.search(r"\.experts\.\d+\.", name)
            for name, tensor in self.tensors.items()
        )

    @property
    def dtype(self) -> str:
        """The type of the weights: "float32", "bfloat16" or "float16"."""
        stated = self.settings.get("dtype") or self.settings.get("torch_dtype")
        if stated in DTYPES.values():
            return str(stated)
        (most_common, _), *_ = Counter(tensor.dtype for tensor in self.tensors.values()).most_common(1)
        return DTYPES[most_common]

    def check(self) -> None:
        """Raises CheckpointError or UnsupportedModelError, naming what is wrong and what would be right."""
        self.check_settings()
        if odd := {tensor.dtype for tensor in self.tensors.values()} - DTYPES.keys():
            raise UnsupportedModelError(
                f"{self.name} has tensors of type {', '.join(sorted(odd))}; supported are {', '.join(DTYPES)}"
            )

    def check_settings(self) -> None:
        """As `check`, as far as config.json tells."""
        if not self.settings.get("architectures"):
            raise CheckpointError(f"{self.path / 'config.json'} does not name an architecture")
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.name} is a {self.architecture}; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        for name, values in _COMPUTED.get(self.architecture, {}).items():
            if self.settings.get(name) not in (None, *values):
                raise UnsupportedModelError(
                    f"{self.name} has {name} {self.settings[name]!r}; "
                    f"a {self.architecture} is computed with {' or '.join(map(repr, values))}"
                )
        if quantization := self.settings.get("quantization_config"):
            layout_of(self.name, quantization)
        if self._rope.kind not in SUPPORTED_ROPE:
            raise UnsupportedModelError(
                f"{self.name} has {self._rope.kind} rotary embeddings; supported are {', '.join(SUPPORTED_ROPE)}"
            )

    @property
    def _rope(self) -> _Rope:
        """Where both names are in use, transformers believes the older one."""
        return msgspec.convert(self.settings.get("rope_scaling") or self.settings.get("rope_parameters") or {}, _Rope)

    def _setting(self, name: str) -> Any:
        value = self.settings.get(name)
        return getattr(self.hf_config, name) if value is None else value


def resolve(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Checkpoint:
    """Find a model: a checkpoint directory, a GGUF file, or the name of a model on the Hugging Face hub.

    A GGUF file is converted once, into the user's cache; a hub model is downloaded into the hub's own cache. Both block
    for as long as that takes, and tell `progress`.

    Raises:
        CheckpointError: it cannot be found or fetched, or its files are missing or damaged.
        UnsupportedModelError: its architecture or quantisation is not one that Phalanx runs.
        ConfigError: a revision is given for a model that has none.
    """
    progress = progress or _silent
    path = Path(os.path.expanduser(model))
    mode = _mode(path)
    if mode is not None and revision is not None:
        raise ConfigError("revision", revision, f"only a model on the hub has revisions, and {model} is a local path")
    if mode is None and _looks_like_path(model):
        raise CheckpointError(f"{model}: there is no such file or directory")
    if mode is None:
        directory = fetch(model, revision, lambda files: Checkpoint(files, model).check_settings(), progress)
    elif stat.S_ISDIR(mode):
        directory = path.resolve()
    else:
        directory = _from_file(path.absolute(), progress)  # links keep their names: the hub's cache is full of them
    checkpoint = Checkpoint(directory, model)
    checkpoint.check()
    return checkpoint


def _mode(path: Path) -> int | None:
    """What kind of file it is; None if there is none. Raises CheckpointError."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: no path has this character
        raise CheckpointError(f"{path} cannot be looked up: {error}") from error


def _silent(what: str, done: int, total: int) -> None:
    """For callers that want no progress."""


def _from_file(file: Path, progress: Progress) -> Path:
    if file.suffix.lower() != ".gguf" or not file.is_file():
        raise CheckpointError(f"{file}: a model is a checkpoint directory, a GGUF file (.gguf) or a hub name")
    from phalanx.models.gguf import convert_once

    return convert_once(file, progress)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") > 1 or model.lower().endswith(".gguf")
