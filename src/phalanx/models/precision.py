"""Which of a model's tensors stay in float32 whatever the dtype of the run: those that choose experts."""

from __future__ import annotations

from typing import Any

import torch

_ROUTERS_IN_THEIR_OWN_DTYPE = ("MiniMaxM2TopKRouter",)
"""They multiply in the type of their weight, which their authors store as float32."""


def kept_dtype(definition: Any, name: str, stored: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter or buffer in a run of `dtype`; `stored` is safetensors' name of the checkpoint's type.

    A persistent buffer is a router's correction bias: in bfloat16 it would choose other experts.
    """
    module_name, _, leaf = name.rpartition(".")
    module = definition.get_submodule(module_name)
    if leaf in dict(module.named_buffers(recurse=False)):
        return torch.float32
    if stored == "F32" and type(module).__name__ in _ROUTERS_IN_THEIR_OWN_DTYPE:
        return torch.float32
    return dtype
