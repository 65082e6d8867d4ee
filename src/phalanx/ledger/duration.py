"""Times as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In words that fit a column."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
