from __future__ import annotations

import numpy as np

from quire.decode.rng import derive_seed, row_seed, splitmix64, uniform


def test_known_outputs_of_splitmix64() -> None:
    """The published generator with seed 0: states 0, gamma, 2 gamma, ..."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(states).tolist() == expected


def test_uniform_over_seeds_and_counters() -> None:
    for draws in (uniform(np.arange(20000), 3), uniform(7, np.arange(20000))):
        counts, _ = np.histogram(draws, bins=20, range=(0, 1))
        chi_square = ((counts - 1000) ** 2 / 1000).sum()
        assert chi_square < 50  # 19 degrees of freedom
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03


def test_derived_seeds_differ_and_repeat() -> None:
    seeds = {derive_seed(base, sample) for base in range(-50, 50) for sample in range(50)}
    assert len(seeds) == 5000
    assert derive_seed(3, 4) == derive_seed(3, 4)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_row_seeds_are_of_job_and_place_alone() -> None:
    assert row_seed(0, 0) == 45548941942605650
    seeds = {row_seed(seed, index) for seed in range(-5, 50) for index in range(100)}
    assert len(seeds) == 5500
    assert all(0 <= seed < 2**56 for seed in seeds)
