"""A model's definition from transformers, built without memory for its weights."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phalanx.models.attention import ATTENTION, register
from phalanx.models.checkpoint import Checkpoint
from phalanx.topology.sharding import Span

_building = threading.Lock()
"""transformers sets torch's default dtype, which is the whole process's, while it builds a model."""


def definition_class(checkpoint: Checkpoint) -> Any:
    """The model's class, such as transformers.LlamaForCausalLM. Imports its module, which takes a second or two."""
    import transformers

    return getattr(transformers, checkpoint.architecture)


def build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with its parameters on the meta device; buffers, such as rotary embeddings' frequencies, are real."""
    from transformers.initialization import no_init_weights

    register()
    config = copy.deepcopy(checkpoint.hf_config)
    with _building, no_init_weights(), _EmptyOnMeta():
        model = definition_class(checkpoint)._from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model.eval()


def keep_stage(definition: Any, layers: Span) -> None:
    """Leave only one stage of the model: some layers, the embedding before the first and the head after the last.

    What another stage computes hands on what it is given, so that the model runs as it is and layers keep their names.
    """
    decoder = definition.base_model
    num_layers = len(decoder.layers)
    for i in range(num_layers):
        if not layers.start <= i < layers.stop:
            decoder.layers[i] = _OfAnotherStage()
    if layers.start > 0:
        definition.set_input_embeddings(nn.Identity())
    if layers.stop < num_layers:
        decoder.norm = nn.Identity()
        definition.set_output_embeddings(nn.Identity())


class _OfAnotherStage(nn.Module):
    """Stands where a decoder layer was."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` allocate nothing. Parameters come from it, unless they are small; buffers are computed.

    `with torch.device("meta")` would lose the buffers' values, and building for real takes memory for the whole model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
