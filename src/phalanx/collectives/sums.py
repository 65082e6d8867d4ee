"""Sums that are the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDED_ONCE = (torch.bfloat16, torch.float16)
"""Added up in float32. Two addends need not be: the sum of two is rounded once anyway."""


def add_up(addends: Sequence[Tensor], out: Tensor, accumulator: Tensor | None) -> None:
    """Add up `addends`, at least two, in their order. `out` is none of them; `accumulator` is float32, if any."""
    total = out if accumulator is None else accumulator
    if accumulator is None:
        torch.add(addends[0], addends[1], out=total)
    else:
        torch.add(total.copy_(addends[0]), addends[1], out=total)
    for addend in addends[2:]:
        total.add_(addend)
    if accumulator is not None:
        out.copy_(accumulator)
