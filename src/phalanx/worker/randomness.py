"""Random numbers that depend on nothing but a request's seed and a position: no state, no order, no batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), with 53 random bits.

    Element `position` of the SplitMix64 stream that starts at the mixed seed (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014, with Stafford's variant 13 of the mixing function). Mixing the seed
    first keeps the streams of neighbouring seeds from being shifts of one another.
    """
    mixed = _mix(_mix(seeds + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
