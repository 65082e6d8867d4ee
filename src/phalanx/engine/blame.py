"""Whether a fault may be a request's doing: what ranks compute can end them in many ways, but not in all."""

from __future__ import annotations

from phalanx.errors import HungError, PeerDiedError, PhalanxError
from phalanx.executor.shared_fate import was_ended_from_outside

_DONE_TO_RANKS = frozenset({"stopped", "lost"})
"""Verdicts: somebody has sent a signal, or a node is gone."""


def came_from_outside(error: PhalanxError) -> bool:
    """Whether it was something else than what ranks computed, as far as anybody can tell: a signal that somebody has
    sent, or the loss of a node or of the process that has started them."""
    if isinstance(error, HungError):
        return error.cause in _DONE_TO_RANKS
    if isinstance(error, PeerDiedError):
        return error.rank is None or was_ended_from_outside(error.detail)
    return False
