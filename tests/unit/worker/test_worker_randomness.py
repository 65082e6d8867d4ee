from __future__ import annotations

import numpy as np

from phalanx.worker.randomness import uniform


def u(seed: int, position: int) -> float:
    return float(uniform(np.array([seed], dtype=np.uint64), np.array([position]))[0])


def test_values_are_fixed_for_good() -> None:
    """A change here changes every seeded output of every user."""
    assert [u(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 131071))] == [
        0.6524484863740322,
        0.7012121095215252,
        0.36818951565166946,
        0.8258740021392166,
    ]


def test_is_elementwise() -> None:
    seeds, positions = np.array([5, 6, 5], dtype=np.uint64), np.array([1, 1, 2])
    assert uniform(seeds, positions).tolist() == [u(5, 1), u(6, 1), u(5, 2)]


def test_is_uniform_and_without_correlation() -> None:
    num = 20_000
    streams = [uniform(np.full(num, seed, dtype=np.uint64), np.arange(num)) for seed in range(4)]
    for stream in streams:
        assert stream.min() >= 0.0
        assert stream.max() < 1.0
        counts = np.bincount((stream * 100).astype(int), minlength=100)
        chi_square = float(((counts - num / 100) ** 2 / (num / 100)).sum())
        assert chi_square < 160  # 99 degrees of freedom: exceeded once in 10,000
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.03
    assert np.abs(np.corrcoef(streams) - np.eye(4)).max() < 0.03


def test_neighbouring_seeds_are_no_shifts_of_one_another() -> None:
    golden = 0x9E3779B97F4A7C15
    assert u(0, 1) != u(golden, 0)
    across_seeds = uniform(np.arange(20_000, dtype=np.uint64), np.zeros(20_000, dtype=np.int64))
    assert abs(float(across_seeds.mean()) - 0.5) < 0.01
