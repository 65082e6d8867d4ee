"""Which steps are replayed from a graph, and from which: a function of the settings and the StepShapes alone.

So all ranks that meet in the collectives of a step replay the same graph, or none does (invariant 1). A graph that is
made late is made by all of them in the same step: the first of its size that their line has seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from phalanx.config import Config
from phalanx.protocol.worker import StepShape
from phalanx.topology.grid import Grid

LARGEST = 512
"""Rows. From there on the GPU has so much to do in a step that giving it the work costs no time."""

_LADDER = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, LARGEST + 1, 32))


def can_have_graphs(config: Config, device_type: str) -> bool:
    """Whether decode steps are to be captured, as far as the settings tell.

    Not where ranks tell each other numbers of rows within a step, and not where experts move: the graph would look for
    them where they were.
    """
    has_fixed_shapes = Grid.of(config.parallel).all2all_backend != "alltoall" and not config.parallel.enable_eplb
    return config.executor.cuda_graphs and device_type == "cuda" and has_fixed_shapes


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Rows of each graph, ascending: steps with fewer rows are padded to the next."""
    most = min(max_num_seqs, LARGEST)
    return (*(size for size in _LADDER if size < most), most)


def size_for(shapes: Sequence[StepShape], sizes: Sequence[int]) -> int | None:
    """The size of the graph that every replica replays; None for a step that runs without: not each row of each replica
    has one token, or there are too many.

    `shapes` are those of all replicas, of which at least one has a token.
    """
    if any(shape.num_tokens != shape.num_rows for shape in shapes):
        return None
    place = bisect_left(sizes, max(shape.num_rows for shape in shapes))
    return sizes[place] if place < len(sizes) else None
