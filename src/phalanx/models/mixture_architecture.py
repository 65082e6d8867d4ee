"""Which mixture-of-experts architecture computes what a dense model does, once its experts are copies of the MLP."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple

import torch

from phalanx.errors import UnsupportedModelError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.definition import definition_class
from phalanx.models.mixture import ArchitectureName, Mixture

MLP_WEIGHT = re.compile(r"(?P<layer>.+\.layers\.\d+\.)mlp\.(?P<matrix>gate|up|down)_proj\.weight")
"""A parameter of a dense model that becomes one of every expert."""

_MIXTURE_WEIGHT = re.compile(r".+\.layers\.\d+\.mlp\.(gate|experts)\..+")

_DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_SAME = (
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
"""Settings that all of these architectures have, with one meaning."""


class Architecture(NamedTuple):
    """A mixture-of-experts architecture, and what the hub's checkpoints call the parts of a layer."""

    model_type: ArchitectureName
    class_name: str
    router: str
    gate: str
    """Of one expert, as are the next two."""
    up: str
    down: str


_MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.{}.w1.weight",
    "block_sparse_moe.experts.{}.w3.weight",
    "block_sparse_moe.experts.{}.w2.weight",
)
_QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "mlp.gate.weight",
    "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.down_proj.weight",
)
ARCHITECTURES: dict[ArchitectureName, Architecture] = {known.model_type: known for known in (_MIXTRAL, _QWEN3_MOE)}


def on_meta(config: Any, model_class: Any) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def pick(checkpoint: Checkpoint, mixture: Mixture) -> tuple[Architecture, Any]:
    """The architecture, the one asked for or the one that fits the model's attention, and its configuration.

    Raises UnsupportedModelError that names what none of them could express.
    """
    if checkpoint.architecture not in _DENSE:
        raise UnsupportedModelError(
            f"{checkpoint.name} is a {checkpoint.architecture}; experts can be made of {', '.join(_DENSE)}"
        )
    if checkpoint.settings.get("quantization_config"):
        raise UnsupportedModelError(f"{checkpoint.name} is quantised; experts can be made of plain weights")
    source = on_meta(checkpoint.hf_config, definition_class(checkpoint))
    wanted = mixture.architecture
    candidates = list(ARCHITECTURES.values()) if wanted is None else [ARCHITECTURES[wanted]]
    reasons = []
    for architecture in candidates:
        config = _configuration(checkpoint, architecture, mixture)
        reason = _obstacle(source, config, architecture)
        if reason is None:
            return architecture, config
        reasons.append(reason)
    raise UnsupportedModelError(
        f"{checkpoint.name}, a {checkpoint.architecture}, cannot become a mixture of experts: {'; '.join(reasons)}"
    )


def _configuration(checkpoint: Checkpoint, architecture: Architecture, mixture: Mixture) -> Any:
    from transformers import AutoConfig

    source = checkpoint.hf_config
    settings = {name: copy.deepcopy(getattr(source, name)) for name in _SAME}
    settings["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    settings["sliding_window"] = next(iter(_windows(source)))
    settings["num_experts_per_tok"] = mixture.num_experts_per_tok
    settings["num_local_experts"] = mixture.num_experts
    if architecture is _QWEN3_MOE:
        settings |= {
            "attention_bias": getattr(source, "attention_bias", False),
            "use_sliding_window": settings["sliding_window"] is not None,
            "num_experts": settings.pop("num_local_experts"),
            "moe_intermediate_size": source.intermediate_size,
            "norm_topk_prob": True,  # copies of one MLP add up to it only if their weights add up to 1
        }
    config = AutoConfig.for_model(architecture.model_type, **settings)
    config.architectures = [architecture.class_name]
    config.dtype = checkpoint.dtype
    return config


def _windows(config: Any) -> set[int | None]:
    """The sliding windows of a dense model's layers."""
    if config.model_type == "llama":
        return {None}
    if config.model_type == "mistral":
        return {config.sliding_window}
    return {config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types}


def _obstacle(source: Any, config: Any, architecture: Architecture) -> str | None:
    """What of the dense model the architecture does not have, or has and the model has not."""
    import transformers

    name = architecture.class_name
    if len(_windows(source.config)) > 1:
        return f"{name} has one sliding window for all layers, and the model has it in some"
    target = on_meta(config, getattr(transformers, name))
    given = [parameter for parameter, _ in source.named_parameters() if not MLP_WEIGHT.fullmatch(parameter)]
    asked = [parameter for parameter, _ in target.named_parameters() if not _MIXTURE_WEIGHT.fullmatch(parameter)]
    if lacking := [parameter for parameter in asked if parameter not in set(given)]:
        return f"{name} has {lacking[0]}, and the model does not"
    if lost := [parameter for parameter in given if parameter not in set(asked)]:
        return f"{name} has no {lost[0]}"
    return None
