"""Who is odd among those that should all say the same. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def minority(votes: Mapping[int, object]) -> list[int]:
    """Who voted for anything but what most did; nobody if there is no majority, or all agree."""
    if not votes:
        return []
    (winner, count), *_ = Counter(votes.values()).most_common(1)
    return sorted(rank for rank, vote in votes.items() if vote != winner) if 2 * count > len(votes) else []
