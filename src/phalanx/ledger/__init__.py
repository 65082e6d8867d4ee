"""Who did what, in which step: journals of every rank that outlive it, and verdicts drawn from them.

For programs that are not ours `install` and `step` are here: see docs/ledger.md, "Other programs".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phalanx.collectives.torch_hook import install, step

__all__ = ["install", "step"]


def __getattr__(name: str) -> object:
    if name in __all__:  # they bring in torch, which whoever reads journals does without
        from phalanx.collectives import torch_hook

        return getattr(torch_hook, name)
    raise AttributeError(f"module 'phalanx.ledger' has no attribute {name!r}")
