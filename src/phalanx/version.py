"""The version of Phalanx: nodes that work together must have the same."""

from __future__ import annotations

__version__ = "0.1.0"
