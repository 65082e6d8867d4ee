"""What the brain is told when a rank cannot go on."""

from __future__ import annotations

import os

import torch

from phalanx.errors import UserError
from phalanx.protocol.columns import WrongSetting
from phalanx.protocol.worker import Failure
from phalanx.worker.error_text import message_of, traceback_of

_BETWEEN_PHASES = ("stepping", "idle", "asleep")
"""What a rank is in for most of its life says nothing of what it did."""

MAX_TEXT_BYTES = 16 * 1024
"""The message must fit into a slot of the queue: a larger one stays with its sender, which is about to end."""


def describe(phase: str, error: Exception) -> Failure:
    """The error as a message. An exception cannot travel itself: that would take pickle."""
    message = message_of(error)
    if isinstance(error, torch.OutOfMemoryError):
        message += "; lower --gpu-memory-utilization, --kv-cache-memory or --max-num-batched-tokens"
    return Failure(
        node=os.uname().nodename,
        phase="" if phase in _BETWEEN_PHASES else phase,
        kind=type(error).__name__,
        message=message.encode()[:MAX_TEXT_BYTES].decode(errors="ignore"),
        traceback=traceback_of(error).encode()[-MAX_TEXT_BYTES:].decode(errors="ignore"),
        is_user_error=isinstance(error, UserError),
        setting=WrongSetting.of(error),
    )
