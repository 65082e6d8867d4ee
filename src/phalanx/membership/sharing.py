"""Which engines' ranks may compute with the same memory of weights."""

from __future__ import annotations

from importlib.metadata import version

from phalanx.config import Config
from phalanx.memory.host import num_memory_nodes
from phalanx.memory.shared_weights import WeightsKind
from phalanx.models.checkpoint import Checkpoint
from phalanx.version import __version__


def may_share(config: Config) -> bool:
    """Whether the ranks of this configuration, which is settled, may have weights in common with others'.

    A worker extension may write to weights at any time, and experts that are shared out are others on each rank.
    """
    model, executor = config.model, config.executor
    if model.share_weights == "never" or not config.healing.heal:
        return False
    if executor.device != "cpu" or executor.launcher == "ray" or executor.worker_extension_cls is not None:
        return False
    if config.parallel.enable_expert_parallel:
        return False
    return model.share_weights == "always" or num_memory_nodes() == 1


def kind_of(config: Config, checkpoint: Checkpoint) -> WeightsKind:
    """Of the ranks of a settled configuration. Reads a page of each tensor, once. Raises CheckpointError."""
    return WeightsKind(
        fingerprint=checkpoint.fingerprint,
        dtype=config.model.dtype,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        pack_weights=config.model.pack_weights,
        versions=(__version__, version("torch"), version("transformers")),
    )
