"""What a client needs of the checkpoint before an engine has said anything: read while the engine starts."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from phalanx.config import Config
from phalanx.engine.generation_config import GenerationConfig
from phalanx.engine.tokenizer import Tokenizer
from phalanx.models.checkpoint import Checkpoint, resolve
from phalanx.protocol.sampling import SamplingParams

_reading = threading.Lock()
"""transformers imports its parts when they are asked for, and loses names when several threads ask at once."""


class Front(NamedTuple):
    """The same for all engines of a model."""

    tokenizer: Tokenizer
    default_sampling: SamplingParams
    vocab_size: int
    """Of tokens that both the tokenizer and the model have: either may have some that the other lacks."""

    @classmethod
    async def load(cls, config: Config, beginning: asyncio.Task[Any]) -> Front:
        """`beginning` is the engine's start, after which what is to be fetched is there."""
        if not Path(os.path.expanduser(config.model.model)).is_dir():
            await beginning  # by then the engine has fetched and converted the checkpoint
        return await asyncio.to_thread(_read, config)


def _read(config: Config) -> Front:
    with _reading:
        return _read_alone(config)


def _read_alone(config: Config) -> Front:
    name, directory = config.model.model, Path(os.path.expanduser(config.model.model))
    is_local = directory.is_dir()
    checkpoint = Checkpoint(directory, name) if is_local else resolve(name, revision=config.model.revision)
    tokenizer = Tokenizer.load(config.model.tokenizer or checkpoint.path)
    default_sampling = GenerationConfig.read(checkpoint.path).default_sampling()
    return Front(tokenizer, default_sampling, min(tokenizer.vocab_size, checkpoint.vocab_size))
