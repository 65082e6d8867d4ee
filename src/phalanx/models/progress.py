"""How what takes long on the way to a model says where it stands."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many bytes of how many are done; both are 0 when there is nothing to count.

While files are downloaded it is called by the threads that download, by one at a time."""
