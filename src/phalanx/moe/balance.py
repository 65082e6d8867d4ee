"""Which ranks have which experts, by how many tokens each expert gets: a pure core.

A placement is a list with the logical expert that each physical expert is a copy of. Physical experts are numbered
through the ranks, each of which has as many of them. The algorithm is DeepSeek's EPLB with its global policy
(https://github.com/deepseek-ai/EPLB): the expert with the most load a copy gets the next copy, then the heaviest copy
goes to the lightest rank that has room.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import product

MIN_GAIN = 0.05
"""Of the busiest rank's load. For less no expert is moved: as much comes and goes from one measurement to the next."""


def first_placement(num_experts: int, num_redundant: int) -> list[int]:
    """What ranks begin with: every expert in turn, and then the first ones again."""
    return [physical % num_experts for physical in range(num_experts + num_redundant)]


def rank_loads(loads: Sequence[int], placement: Sequence[int], num_ranks: int) -> list[float]:
    """The load of each rank, if the copies of an expert share its load evenly."""
    num_copies = Counter(placement)
    share = len(placement) // num_ranks
    return [
        sum(loads[expert] / num_copies[expert] for expert in placement[rank * share : (rank + 1) * share])
        for rank in range(num_ranks)
    ]


def rebalance(loads: Sequence[int], current: Sequence[int], num_ranks: int) -> list[int]:
    """A placement under which the busiest rank has less load, or the current one if there is little to gain.

    `loads` are those of the logical experts. Takes O(P log P) for P physical experts, and R² more for R ranks.
    """
    assert len(current) % num_ranks == 0
    copies = _replicate(loads, len(current))
    placement = _keep_places(_pack(loads, copies, num_ranks), current)
    before, after = max(rank_loads(loads, current, num_ranks)), max(rank_loads(loads, placement, num_ranks))
    return placement if after < before * (1 - MIN_GAIN) else list(current)


def _replicate(loads: Sequence[int], num_physical: int) -> list[int]:
    """How many copies of each expert there shall be."""
    copies = [1] * len(loads)
    heaviest = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heaviest)
    for _ in range(num_physical - len(loads)):
        _, expert = heaviest[0]
        copies[expert] += 1
        heapq.heapreplace(heaviest, (-loads[expert] / copies[expert], expert))
    return copies


def _pack(loads: Sequence[int], copies: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Packs of as many physical experts each, as evenly loaded as taking the heaviest first makes them.

    A pack may get two copies of an expert: to keep them apart makes the heaviest pack no lighter.
    """
    physical = [expert for expert, num_copies in enumerate(copies) for _ in range(num_copies)]
    physical.sort(key=lambda expert: -loads[expert] / copies[expert])
    share = len(physical) // num_ranks
    packs: list[list[int]] = [[] for _ in range(num_ranks)]
    lightest = [(0.0, pack) for pack in range(num_ranks)]
    for expert in physical:
        load, pack = heapq.heappop(lightest)
        packs[pack].append(expert)
        if len(packs[pack]) < share:
            heapq.heappush(lightest, (load + loads[expert] / copies[expert], pack))
    return packs


def _keep_places(packs: Sequence[list[int]], current: Sequence[int]) -> list[int]:
    """Give the packs to ranks, so that few experts move: to each the one that is most like what it has.

    An expert that stays with its rank stays where it is there.
    """
    num_ranks, share = len(packs), len(current) // len(packs)
    had = [list(current[rank * share : (rank + 1) * share]) for rank in range(num_ranks)]
    counted_packs, counted_had = list(map(Counter, packs)), list(map(Counter, had))
    common = [
        ((counted_packs[pack] & counted_had[rank]).total(), pack, rank)
        for pack, rank in product(range(num_ranks), repeat=2)
    ]
    pack_of: dict[int, int] = {}
    free = set(range(num_ranks))
    for _, pack, rank in sorted(common, key=lambda entry: -entry[0]):
        if rank not in pack_of and pack in free:
            pack_of[rank] = pack
            free.remove(pack)
    return [expert for rank in range(num_ranks) for expert in _keep_order(packs[pack_of[rank]], had[rank])]


def _keep_order(pack: Sequence[int], had: Sequence[int]) -> list[int]:
    """The pack, with what was there before in its place."""
    left = Counter(pack)
    placed: list[int | None] = []
    for expert in had:
        stays = left[expert] > 0
        left[expert] -= stays
        placed.append(expert if stays else None)
    new = left.elements()
    return [next(new) if expert is None else expert for expert in placed]
